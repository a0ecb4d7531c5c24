from trl_opsd.study.arms import ARMS, BASES, LEARNING_RATES, STEPS


def test_arms_are_alike_in_what_they_do_not_say():
    for arm in ARMS.values():
        assert set(arm.bases) <= set(BASES)
        assert "learning_rate" not in arm.settings
        assert arm.tuned_as is None or ARMS[arm.tuned_as].tuned_as is None
        if arm.trainer in ("sft", "sdft", "opsd") and arm.tuned_as is None:
            assert (arm.steps, arm.batch_size) == (STEPS, ARMS["opsd"].batch_size)
        if arm.tuned_as is not None:
            assert set(arm.bases) <= set(ARMS[arm.tuned_as].bases)
            assert arm.batch_size == ARMS[arm.tuned_as].batch_size
    long = [ARMS[name] for name in ("opsd_long", "opsd_live_long", "opsd_clip_long")]
    assert {(arm.steps, arm.tuned_as, arm.constant_rate) for arm in long} == {(5 * STEPS, "opsd", True)}
    opsdc = [arm for arm in ARMS.values() if arm.trainer == "opsdc" and arm.trained_as is None]
    assert {(arm.steps, arm.batch_size, arm.constant_rate) for arm in opsdc} == {(100, 32, True)}
    for arm in ARMS.values():
        if arm.trained_as is not None:
            assert arm.bases == ARMS[arm.trained_as].bases
            assert arm.tuned_as not in (None, arm.trained_as)
    sequences = {name: ARMS[name].steps * ARMS[name].batch_size for name in ("grpo", "opsd")}
    assert sequences["grpo"] == 4 * sequences["opsd"]
    assert list(LEARNING_RATES) == sorted(LEARNING_RATES)
