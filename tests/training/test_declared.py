"""What training writes into metrics.jsonl and run.json is declared in base/runfolder.py, and what is declared is
written."""

import ast
from pathlib import Path

from base.runfolder import EVENTS, ROWS, RUN, RUN_KEYS, read_json, read_metrics, undeclared

ROOT = Path(__file__).parents[2]
SOMETIMES = {"bpb_approximate"}  # tests/training/test_given_tokenizers.py


def test_every_row_of_a_run_is_declared_and_every_field_is_written(run, stop_after):
    words = ("quant=quartet2", "evaluate.bf16=true", "evaluate.slots=true", "hooks.ema.decay=0.9", "probes.errors={}")
    words += ("evaluate.served=true",)
    words += ("probes.xray={steps: [5], tokens: 128, slices: 2, draws: 3, recipes: [nvidia]}",)
    words += ("probes.oscillation={every: 5, window: 2}",)
    with stop_after(3):
        run(*words)
    _, folder = run(*words)
    written = read_metrics(folder)
    assert {str(problem) for row in written for problem in undeclared(row)} == set()
    for kind, fields in ROWS.items():
        seen = set().union(*(row for row in written if row["kind"] == kind))
        assert set(fields) - seen <= SOMETIMES, kind
    events = {row["event"]: set(row) - {"kind", "event", "step", "tokens", "time"} for row in written if "event" in row}
    assert events.keys() >= {"start", "resume", "checkpoint", "interrupt", "finish"}
    assert {event: set(EVENTS[event]) for event in events} == events


def test_every_event_in_the_source_is_declared():
    """Those of bad steps and hung ranks, too, which a short run doesn't have."""
    calls = []
    for path in sorted((ROOT / "training").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            if name in ("event", "_event") and node.args:
                calls.append((path.name, node.args[0], {word.arg for word in node.keywords if word.arg}))
    named = [(file, event.value, fields) for file, event, fields in calls if isinstance(event, ast.Constant)]
    assert {"nonfinite", "finish", "interrupt"} <= {event for _, event, _ in named}
    for file, event, fields in named:
        assert fields <= set(EVENTS[event]), f"{file}: {event}"


def test_run_json_has_what_readers_need(run):
    _, folder = run("quant=bf16", "evaluate.every=null")
    assert set(RUN_KEYS) <= set(read_json(folder / RUN))
