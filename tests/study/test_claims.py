from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study.made import SEEDS, false, noisy, result, true

from trl_opsd.experiment.arms import BASES
from trl_opsd.experiment.figures import best_accuracy, drop, reduction, tokens_to_reach
from trl_opsd.study.arms import ARMS, LEARNING_RATES
from trl_opsd.study.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    NOT_RUN,
    UNSEEN,
    Condition,
    judge,
    verdicts,
)


BEATS = "OPSD beats SFT and off-policy distillation"


def outcomes(lookup):
    return {(verdict.claim, verdict.base): verdict.outcome for verdict in verdicts(lookup, list(BASES))}


@pytest.mark.parametrize(("lookup", "expected"), [(true, HOLDS), (false, FAILS), (noisy, UNSEEN)])
def test_every_claim_can_come_out_in_every_way(lookup, expected):
    found = outcomes(lookup)
    assert len(found) == sum(len(claim.bases) for claim in CLAIMS)
    assert found == dict.fromkeys(found, expected)


@pytest.mark.parametrize("gone", ["opsd", "opsdc_50", "base", "grpo"])
def test_a_claim_is_not_run_without_the_arms_it_is_about(gone):
    found = outcomes(lambda arm, base: {} if arm == gone else true(arm, base))
    counts = Counter(found.values())
    assert set(counts) == {HOLDS, NOT_RUN}


def test_every_trained_arm_that_a_claim_asks_for_exists():
    asked = set()

    def lookup(arm, base):
        asked.add((arm, base))
        return true(arm, base)

    verdicts(lookup, list(BASES))
    for arm, base in asked:
        assert arm == "base" or base in ARMS[arm].bases


def test_one_seed_is_not_enough():
    found = outcomes(lambda arm, base: {seed: value for seed, value in true(arm, base).items() if seed == 1})
    assert set(found.values()) == {NOT_RUN}


def test_seeds_are_paired():
    # Seeds far apart, with the same difference in each
    level = {1: 0.2, 2: 0.5, 3: 0.8}

    def lookup(arm, base):
        better = arm in ("opsd", "opsd_terse")
        return {seed: result(accuracy=value + 0.1 * better, ood=value) for seed, value in level.items()}

    assert outcomes(lookup)[f"{BEATS} on terse solutions, held out", "weak"] == HOLDS


@pytest.mark.parametrize("accuracy", [0.99, 0.01])
def test_nothing_shows_where_both_arms_are_at_an_end(accuracy):
    def lookup(arm, base):
        return {seed: result(accuracy=accuracy, ood=accuracy) for seed in SEEDS}

    assert outcomes(lookup)[f"{BEATS} on worked solutions, held out", "weak"] == UNSEEN
    assert outcomes(lookup)[f"{BEATS} on worked solutions, in words", "weak"] == UNSEEN
    assert outcomes(lookup)["Forward KL is best for OPSD", "middling"] == UNSEEN


def test_a_grpo_that_learnt_nothing_shows_nothing():
    def lookup(arm, base):
        grpo = {seed: (0.1, 0.12 if seed == 2 else 0.4) for seed in SEEDS}
        return {seed: result(curve=grpo[seed] if arm == "grpo" else (0.1, 0.8)) for seed in SEEDS}

    claim = "OPSD needs at least 4 times fewer generated tokens than GRPO for the same accuracy"
    assert outcomes(lookup)[claim, "weak"] == UNSEEN


def test_grpos_best_has_to_be_reached_with_every_seed():
    curves = {1: (0.1, 0.4), 2: (0.1, 0.4), 3: (0.1, 0.3)}

    def lookup(arm, base):
        return {seed: result(curve=curves[seed] if arm == "opsd" else (*[0.1] * 200, 0.4)) for seed in SEEDS}

    claim = "OPSD needs at least 4 times fewer generated tokens than GRPO for the same accuracy"
    assert outcomes(lookup)[claim, "weak"] == UNSEEN
    (verdict,) = (one for one in verdicts(lookup, ["weak"]) if (one.claim, one.base) == (claim, "weak"))
    assert "open: reached by 2 of 3 seeds" in str(verdict.conditions[0])


def test_groups_that_never_had_spread_did_not_lose_it():
    def lookup(arm, base):
        return {seed: result(curve=(0.1, 0.6), spread=(0.9, 0.9)) for seed in SEEDS}

    assert outcomes(lookup)["Most of GRPO's groups have no spread of rewards", "weak"] == HOLDS
    assert outcomes(lookup)["GRPO's groups lose their spread of rewards as it trains", "weak"] == FAILS


@pytest.mark.parametrize(
    ("fixed", "live", "outcome"),
    [
        ({"accuracy": 0.8, "curve": (0.1, *3 * (0.8,))}, {"accuracy": 0.8, "curve": (0.1, *3 * (0.8,))}, UNSEEN),
        ({"accuracy": 0.5, "curve": (0.1, *3 * (0.9,), *3 * (0.5,))}, {"accuracy": 0.1, "curve": (0.1,) * 6}, UNSEEN),
        # It loses what the base knew, before it learns anything
        (
            {"accuracy": 0.9, "curve": (0.5, *3 * (0.9,))},
            {"accuracy": 0.0, "curve": (0.5, 0.5, 0.2, *3 * (0.0,))},
            HOLDS,
        ),
        # It loses more and yet ends better
        (
            {"accuracy": 0.5, "curve": (0.1, *3 * (0.5,))},
            {"accuracy": 0.7, "curve": (0.1, *3 * (0.9,), *3 * (0.7,))},
            FAILS,
        ),
    ],
    ids=["nothing lost", "nothing learnt", "everything lost", "better in the end"],
)
def test_a_fixed_teacher_has_to_keep_more_and_to_end_better(fixed, live, outcome):
    made = {"opsd_long": fixed, "opsd_live_long": live}

    def lookup(arm, base):
        return {seed: result(**made.get(arm, {})) for seed in SEEDS}

    assert outcomes(lookup)["A fixed teacher is more stable than a live one", "middling"] == outcome


def test_half_the_compression_is_not_little():
    def lookup(arm, base):
        tokens = {"base": 100.0, "opsdc_50": 50.0, "opsdc_frozen": 70.0}.get(arm, 50.0)
        return {seed: result(tokens=tokens) for seed in SEEDS}

    assert outcomes(lookup)["Never refreshing the teacher compresses little", "verbose"] == FAILS


def test_a_clip_without_a_collapse_shows_nothing():
    steady = {"opsd_long": {"curve": (0.8,) * 6}, "opsd_clip_long": {"curve": (0.8,) * 6}}

    def lookup(arm, base):
        return {seed: result(**steady[arm]) for seed in SEEDS} if arm in steady else true(arm, base)

    assert outcomes(lookup)["The clip prevents collapse", "middling"] == UNSEEN


@pytest.mark.parametrize(
    ("without", "clipped"),
    [
        ((0.1, *3 * (0.9,), *3 * (0.79,)), (0.5,) * 6),  # keeps what it has, since it learns nothing
        ((0.1, *3 * (0.9,), *3 * (0.1,)), (0.1, *3 * (0.9,), *3 * (0.3,))),  # collapses as well
    ],
)
def test_a_clip_that_prevents_no_collapse(without, clipped):
    made = {"opsd_long": without, "opsd_clip_long": clipped}

    def lookup(arm, base):
        return {seed: result(accuracy=made[arm][-1], curve=made[arm]) if arm in made else result() for seed in SEEDS}

    assert outcomes(lookup)["The clip prevents collapse", "middling"] == FAILS


def test_what_was_lost_is_taken_from_means_of_neighbours():
    assert drop(result(curve=(0.1, 0.9, 0.5, 0.5, 0.5))) == pytest.approx((0.9 + 0.5 + 0.5) / 3 - 0.5)
    assert drop(result(curve=(0.1, 0.2, 0.3, 0.4))) == 0.0


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if "collapses" in claim.text], ids=lambda c: c.text)
def test_a_collapse_of_all_is_no_effect_of_one(claim):
    def lookup(arm, base):
        return {seed: result(accuracy=0.9 if arm == "base" else 0.3) for seed in SEEDS}

    assert outcomes(lookup)[claim.text, "verbose"] == FAILS


@pytest.mark.parametrize(
    "claim", [claim for claim in CLAIMS if "each at its best" in claim.text], ids=lambda c: c.text
)
def test_a_collapse_at_the_lowest_rate_of_the_grid_may_be_the_rates(claim):
    def lookup(arm, base):
        return {seed: replace_rate(run, min(LEARNING_RATES)) for seed, run in true(arm, base).items()}

    assert outcomes(lookup)[claim.text, "verbose"] == UNSEEN
    same = claim.text.replace("each at its best learning rate", "at the same learning rate")
    assert outcomes(lookup)[same, "verbose"] == HOLDS


def replace_rate(run, rate):
    return {**run, "settings": {"run": {"learning_rate": rate}}}


def test_lengths_of_the_base_are_only_measured():
    def lookup(arm, base):
        return {seed: result(lengths=(80.0,) * 3 if arm == "base" else (38.5, 40.0, 41.0)) for seed in SEEDS}

    claim = "Compression is adaptive: easy problems shrink more than hard ones"
    (verdict,) = (one for one in verdicts(lookup, ["verbose"]) if one.claim == claim)
    mean, low, high = verdict.conditions[0].interval()
    assert mean == pytest.approx(2.5 / 80)
    assert high - mean == pytest.approx(1.96 * 0.15 / 10 * (38.5**2 + 41**2) ** 0.5 / 80) == mean - low


def test_what_shrinks_by_nothing_is_not_adaptive():
    def lookup(arm, base):
        return {seed: result() for seed in SEEDS}

    found = outcomes(lookup)
    assert found["Compression is adaptive: easy problems shrink more than hard ones", "verbose"] == UNSEEN
    assert found["Never refreshing the teacher compresses little", "verbose"] == UNSEEN


def test_seeds_that_failed_are_left_out_of_both_sides():
    def lookup(arm, base):
        made = true(arm, base)
        if arm == "opsd":
            made[1] = result(accuracy=0.0)
        return {seed: run for seed, run in made.items() if (arm, seed) != ("opsd_jsd", 1)}

    (claim,) = (claim for claim in CLAIMS if claim.text == "Forward KL is best for OPSD")
    condition = claim.conditions(lookup, "middling")[1]
    assert condition.values == pytest.approx([0.2, 0.2])
    assert "(80.0 − 60.0 %)" in condition.text


@pytest.mark.parametrize(
    ("values", "margin", "state"),
    [
        ([0.1, 0.1, 0.1], 0.02, "met"),
        ([0.01, 0.01, 0.01], 0.02, "refuted"),  # surely there, and surely too small to matter
        ([-0.1, -0.1, -0.1], 0.02, "refuted"),
        ([-0.3, 0.1, 0.4], 0.02, "open"),
        ([0.1], 0.02, "missing"),
        ([], 0.02, "missing"),
    ],
)
def test_states_of_a_condition(values, margin, state):
    assert Condition("x", values, margin).state() == state
    if state in ("met", "refuted", "open"):
        blocked = Condition("x", values, margin, obstacle="nothing could show")
        assert blocked.state() == "open"
        assert "(open: nothing could show)" in str(blocked)
        doubtful = Condition("x", values, margin, doubt="not all got there")
        assert doubtful.state() == {"met": "open"}.get(state, state)
        assert "not all got there" in str(doubtful)


def test_the_interval_is_students():
    mean, low, high = Condition("x", [1.0, 2.0, 3.0], 0.0).interval()
    assert mean == 2.0
    assert high - mean == pytest.approx(4.3027 / 3**0.5, rel=1e-3) == mean - low


def test_seeds_that_agree_do_not_make_up_for_few_problems():
    def lookup(arm, base):
        return {seed: result(accuracy=0.55 if arm == "opsd" else 0.5) for seed in SEEDS}

    (claim,) = (claim for claim in CLAIMS if claim.text == "Forward KL is best for OPSD")
    for condition in claim.conditions(lookup, "middling"):
        mean, low, high = condition.interval()
        error = ((0.55 * 0.45 + 0.5 * 0.5) / 300) ** 0.5
        assert (mean, low, high) == pytest.approx((0.05, 0.05 - 1.96 * error, 0.05 + 1.96 * error))
        assert "(55.0 − 50.0 %)" in str(condition)
    assert outcomes(lookup)[claim.text, "middling"] == UNSEEN


def test_a_condition_says_its_numbers():
    assert str(Condition("gain", [0.1, 0.1], 0.02)) == "gain +10.0 [+10.0, +10.0] over 2 seeds (met)"
    tokens = Condition("tokens", [1.0, 1.0], 0.0, shown=lambda value: f"{4 * 2**value:.1f}")
    assert str(tokens) == "tokens 8.0 [8.0, 8.0] over 2 seeds (met)"
    assert str(Condition("gain", [0.1], 0.02)) == "gain: not run"


_VALUES = st.lists(st.floats(-1, 1), min_size=0, max_size=5)


@given(st.lists(st.tuples(_VALUES, st.floats(0, 0.2)), min_size=1, max_size=4))
def test_a_claim_is_as_strong_as_its_weakest_condition(drawn):
    conditions = [Condition("x", values, margin) for values, margin in drawn]
    states = {condition.state() for condition in conditions}
    assert (judge(conditions) == HOLDS) == (states == {"met"})
    assert (judge(conditions) == NOT_RUN) == ("missing" in states)
    assert (judge(conditions) == FAILS) == ("missing" not in states and "refuted" in states)


def test_tokens_and_lengths_are_read_from_the_curve_and_the_end():
    run = result(curve=(0.1, 0.5, 0.4, 0.7), lengths=(30.0, 40.0, 50.0))
    assert best_accuracy(run) == 0.7
    assert [tokens_to_reach(run, target) for target in (0.05, 0.5, 0.6, 0.8)] == [0, 1000, 3000, None]
    base = result(tokens=80.0, lengths=(60.0, 80.0, 100.0))
    assert reduction(run, base) == 0.5
    assert reduction(run, base, "2") == 0.5
