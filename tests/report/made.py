"""Training runs made up for the tests."""

import json
from dataclasses import asdict

from trl_opsd.eval.metrics import summarize
from trl_opsd.eval.run_folder import write_json
from trl_opsd.eval.samples import Sample


METHOD = {
    "name": "OPSD",
    "paper": "2601.18734",
    "title": "A title",
    "citation": "@misc{opsd}",
    "status": "seen-paper",
}


def entry(step, **values):
    return {"step": step, "epoch": step / 10, **values}


def steps(*losses, **values):
    """An entry for each step."""
    return [
        entry(
            step,
            **{
                "loss": loss,
                "distillation_loss": loss / 2,
                "entropy": 0.5,
                "teacher_entropy": 0.25,
                "entropy_gap": 0.25,
                "completions/mean_length": 10.0 + step,
                "rollouts/truncated_rate": 0.125,
                "step_time": 2.0,
                "num_tokens": 100.0 * step,
                "num_generated_tokens": 40.0 * step,
                "memory/peak": 1.5,
                **values,
            },
        )
        for step, loss in enumerate(losses, 1)
    ]


def session(step=0, defaults=None, guards=(), **settings):
    settings = {"learning_rate": 1e-5, "teacher": "initial", "output_dir": "somewhere", **settings}
    return {
        "step": step,
        "time": "2026-01-02T03:04:05+00:00",
        "settings": settings,
        "defaults": defaults or {},
        "versions": {"trl": "1.16.0", "vllm": None},
        "devices": "1 × cpu",
        "guards": list(guards),
    }


def make_run(folder, log, max_steps=None, sessions=(), method=METHOD):
    folder.mkdir(parents=True)
    last = max((row["step"] for row in log), default=0)
    state = {"log_history": log, "global_step": last, "max_steps": max_steps or last}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if sessions:
        record = {"method": method, "config": "OPSDConfig", "summary": [["student", "tiny"]], "sessions": sessions}
        (folder / "training_run.json").write_text(json.dumps(record))
    return folder


def make_evaluation(folder, *verdicts, benchmark="sums", completion="So it is {}.", scorer="5"):
    """One problem for each verdict."""
    samples = [
        Sample(
            benchmark=benchmark,
            problem_id=f"p{index:02d}",
            sample_index=0,
            seed=None,
            completion=completion.format(index),
            num_tokens=10 + index,
            terminated=True,
            reference=str(index),
            correct=verdict,
            answer=str(index),
            answer_format="bare",
        )
        for index, verdict in enumerate(verdicts)
    ]
    (folder / benchmark).mkdir(parents=True)
    write_json(folder / "run.json", {"settings": {"scorer_version": scorer}})
    write_json(folder / benchmark / "metrics.json", {"summary": summarize(samples)})
    lines = [json.dumps(asdict(sample)) + "\n" for sample in samples]
    (folder / benchmark / "samples.jsonl").write_text("".join(lines))
    problems = [
        json.dumps({"problem_id": one.problem_id, "prompt": f"How much is {one.problem_id}?"}) for one in samples
    ]
    (folder / benchmark / "problems.jsonl").write_text("\n".join(problems) + "\n")
    return summarize(samples)


def logged(step, summary):
    """What an evaluation while training logs."""
    name = f"eval_{summary.benchmark}"
    return entry(
        step,
        **{
            f"{name}/mean_tokens": summary.mean_tokens.value,
            f"{name}/truncation_rate": summary.truncation_rate.value,
            f"{name}/avg@1": summary.avg_at_k.value,
            f"{name}/avg@1_low": summary.avg_at_k.low,
            f"{name}/avg@1_high": summary.avg_at_k.high,
        },
    )
