"""The study: published claims about self-distillation, put to the test on embedded tasks."""
