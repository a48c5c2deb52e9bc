"""Tasks of EleutherAI's lm-eval asked of a run's model: https://github.com/EleutherAI/lm-evaluation-harness."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from base.words import suggestion
from training.likelihood import Likelihood

GENERATES = "generate_until"


class Adapter:
    """What lm-eval asks of a model, beside its class LM. Requests have `args`, and `task_name` and `doc_id`, by which
    the choices of one question are known."""

    def __init__(self, likelihood: Likelihood):
        super().__init__()
        self.likelihood = likelihood

    def loglikelihood(self, requests: Iterable[Any]) -> list[tuple[float, bool]]:
        """(ln of the probability, whether greedy decoding gives it) for args (context, text)."""
        out = []
        for _, question in groupby(requests, lambda request: (request.task_name, request.doc_id)):
            answers = self.likelihood.score([self.likelihood.parts(*request.args) for request in question])
            out += [(-answer.nats, answer.greedy) for answer in answers]
        return out

    def loglikelihood_rolling(self, requests: Iterable[Any]) -> list[float]:
        """ln of the probability of args (text,) as a document."""
        texts = [self.likelihood.parts("", *request.args) for request in requests]
        return [-self.likelihood.score([text])[0].nats for text in texts]

    def generate_until(self, requests: Iterable[Any]) -> list[str]:
        raise ValueError("tasks that let the model write aren't built; name tasks of choices or of likelihood")


class Harness:
    """The named tasks, loaded. Raises RuntimeError without lm-eval; ValueError for a name that it doesn't know, a task
    whose data can't be had, and one that lets the model write.

    folder: of task files of one's own; lm-eval's own are read only for names that aren't there (they are 14,000).
    """

    def __init__(self, names: list[str], folder: Path | None = None):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--task-path {folder}: needs a folder with lm-eval's task files (*.yaml)")
        try:
            import lm_eval
        except ImportError:
            raise RuntimeError("--tasks needs lm-eval: pip install 'nibble-train[eval]'") from None
        from lm_eval.tasks import TaskManager

        self.version = lm_eval.__version__
        path = None if folder is None else str(folder)
        self.manager = TaskManager(include_path=path, include_defaults=False) if path else None
        if self.manager is None or set(names) - set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=path)
        for name in names:
            if name not in self.manager.all_tasks:
                near = suggestion(name, self.manager.all_tasks, "python -m lm_eval ls tasks prints all")
                raise ValueError(f"--tasks {name}: no task of lm-eval {self.version}, nor of --task-path{near}")
        self.tasks: list[Any] = []
        for name in dict.fromkeys(names):
            self.tasks += self._load(name)

    def _load(self, name: str) -> list[Any]:
        """The group of this name, or its tasks."""
        try:
            found = self.manager.load(name)
        except Exception as error:  # of datasets, of the network, of the task's own code
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"--tasks {name}: can't be loaded: {reason}; its data may be a local file, named by "
                "a task file under --task-path"
            ) from error
        writes = [task for task, made in found["tasks"].items() if made.OUTPUT_TYPE == GENERATES]
        if writes:
            raise ValueError(
                f"--tasks {name}: {', '.join(writes[:3])} lets the model write, which isn't built; name "
                "tasks of choices or of likelihood"
            )
        group = found.get("groups", {}).get(name)
        return list(found["tasks"].values()) if group is None else [group]

    def ask(self, likelihood: Likelihood) -> dict[str, dict[str, Any]]:
        """{task: source, questions, shots, metrics {name: [value, standard error or null]}}"""
        from lm_eval.api.model import LM
        from lm_eval.evaluator import simple_evaluate

        class Model(Adapter, LM):
            """lm-eval takes nothing but its own class."""

        found = simple_evaluate(model=Model(likelihood), tasks=self.tasks, task_manager=self.manager, log_samples=False)
        return {
            name: {
                "source": f"lm-eval {self.version}",
                "questions": found["n-samples"].get(name, {}).get("effective", row.get("sample_len")),
                "shots": found["n-shot"].get(name),
                "metrics": metrics(row),
            }
            for name, row in found["results"].items()
        }


def metrics(row: dict[str, Any]) -> dict[str, list[float | None]]:
    """lm-eval's figures "acc,none" and "acc_stderr,none" as acc: [value, error]; the name of another filter stays."""
    out = {}
    for key, value in row.items():
        name, comma, rule = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{name}_stderr,{rule}")
            out[name if rule == "none" else key] = [value, error if isinstance(error, int | float) else None]
    return out
