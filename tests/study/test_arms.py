from trl_opsd.study.arms import ARMS, BASES, LEARNING_RATES


def test_arms_are_alike_in_what_they_do_not_say():
    for arm in ARMS.values():
        assert set(arm.bases) <= set(BASES)
        assert "learning_rate" not in arm.settings
        assert arm.tuned_as is None or ARMS[arm.tuned_as].tuned_as is None
        if arm.trainer in ("sft", "sdft", "opsd") and arm.tuned_as is None:
            assert (arm.steps, arm.batch_size) == (ARMS["opsd"].steps, ARMS["opsd"].batch_size)
        if arm.tuned_as is not None:
            assert arm.steps == 5 * ARMS[arm.tuned_as].steps
            assert arm.settings == ARMS[arm.tuned_as].settings
    sequences = {name: ARMS[name].steps * ARMS[name].batch_size for name in ("grpo", "opsd")}
    assert sequences["grpo"] == 4 * sequences["opsd"]
    assert list(LEARNING_RATES) == sorted(LEARNING_RATES)
