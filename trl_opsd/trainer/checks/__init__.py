"""Everything that is refused, a file per stage at which something becomes known: settings, parts, model, world."""
