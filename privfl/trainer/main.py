"""A site's trainer: the process that holds torch, the user's code and the records, and no key.

Started by the agent as ``python -m privfl.trainer.main SITE ...``; it answers requests until the agent goes away. It never imports
mpi4py: an MPI library in a child of a rank would take itself for that rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from privfl.config import Experiment, load_function
from privfl.errors import EXIT_OURS, EXIT_USER, OutsideGuarantee, PrivflError, in_one_line
from privfl.trainer.channel import Closed, Link, SharedVector

if TYPE_CHECKING:
    from privfl.dp.training import Recipe

_PACKAGE = str(Path(__file__).parents[1])


def main(arguments: list[str]) -> None:
    """Serve the agent. ``arguments``: site, descriptors of the link, of the life line and of the two vectors."""
    sys.modules["mpi4py"] = None  # type: ignore[assignment]
    site, *descriptors = arguments
    link_end, life, replica, update = map(int, descriptors)
    threading.Thread(target=_end_with_agent, args=(life,), daemon=True).start()
    link = Link(socket.socket(fileno=link_end))
    trainer, log = None, ""
    with contextlib.suppress(Closed):
        while True:
            request = link.receive()
            log = request.get("log", log)
            try:
                if trainer is None:
                    trainer = _Trainer(site, request, SharedVector(replica), SharedVector(update))
                    answer = trainer.facts()
                else:
                    answer = trainer.serve(request)
            except (Exception, SystemExit) as error:
                # SystemExit too: user code that calls sys.exit() must not look like a crash.
                ours = not isinstance(error, PrivflError)
                if ours:
                    traceback.print_exc()
                text = f"internal error in the trainer: {type(error).__name__}" if ours else str(error)
                raised = isinstance(error.__cause__, BaseException) and not isinstance(error.__cause__, PrivflError)
                where = "; read what it said in" if raised and not ours else "; log:"
                answer = {"failed": in_one_line(f"{text}{where} {log}"), "exit_code": EXIT_OURS if ours else EXIT_USER}
            sys.stdout.flush()
            link.send(answer)


def _end_with_agent(life: int) -> None:
    """Leave at once when the agent's end of the pipe closes, also in the middle of a long step."""
    os.read(life, 1)
    os._exit(0)


@contextlib.contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Turn whatever user code raises into one sentence; its message and traceback go to the site's log and no further.

    The message may quote a record ("could not convert string to float: ..."), and the sentence leaves the site in the clear.
    """
    try:
        yield
    except PrivflError:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(_PACKAGE)]
        place = f" in line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""
        raise PrivflError(f"{what} raised {type(error).__name__}{place}") from error


def recipe_of(experiment: Experiment, site: str, noise_multiplier: float | None) -> Recipe:
    """How a site trains; without noise of its own if ``noise_multiplier`` is None."""
    from privfl.dp.training import Recipe

    return Recipe(
        sampling_rate=experiment.rate(site),
        noise_multiplier=noise_multiplier,
        max_grad_norm=experiment.privacy.max_grad_norm,
        local_steps=experiment.local_steps,
        optimizer=experiment.optimizer.name,
        optimizer_options=experiment.optimizer.options(),
    )


class _Trainer:
    """Model, records and the local training of one site."""

    def __init__(self, site: str, setup: dict[str, Any], replica: SharedVector, update: SharedVector) -> None:
        import torch

        from privfl.dp.training import LocalTraining
        from privfl.noise.randomness import SeededRandomness, SystemRandomness

        experiment = Experiment.model_validate_json(setup["experiment"])
        folder = Path(setup["folder"])
        self._replica, self._update = replica, update
        sys.path.insert(0, str(folder))
        self._private = experiment.evaluation.records == "private"
        self._metrics = {
            name: load_function(f"evaluation.metrics.{name}", reference, folder)
            for name, reference in experiment.evaluation.metrics.items()
        }
        torch.set_num_threads(setup["threads"])
        device = _device(setup["device"])
        functions = {key: load_function(key, getattr(experiment, key), folder) for key in ("model", "data", "loss")}

        # torch's own generator starts from one constant in every process; dropout must differ between sites.
        torch.seed()
        with _user_code(f"model ({experiment.model})"), torch.random.fork_rng():
            # The one public seed: it makes the initial replicas equal. Noise and samples never come from torch.
            torch.manual_seed(_public_seed(experiment, setup["run"]))
            model = functions["model"]()
        _check_arguments(experiment.data, functions["data"], site, setup["data_options"])
        with _user_code(f"data ({experiment.data})"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", OutsideGuarantee)
                pair = functions["data"](site, **setup["data_options"])
            self._outside = _said_outside(caught)
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise PrivflError(f"data ({experiment.data}) must return a pair (train, held_out)")
        train, self._held_out = pair
        self._sums = experiment.algorithm == "fedsgd"
        seed = experiment.insecure_test_seed
        recipe = recipe_of(experiment, site, setup["noise_multiplier"])
        randomness = SystemRandomness() if seed is None else SeededRandomness(seed, site)
        with _user_code("preparing the model"):
            self._training = LocalTraining(model, functions["loss"], train, recipe, randomness, device)
        if self._private and self._metrics and self._held_out is not None and len(self._held_out) > 0:
            with _user_code("evaluating model and metrics on the held-out records"):
                self._training.check_outputs(self._held_out)
        # The number of ratios of each metric is fixed before training; it must be the same at all sites.
        self._layout = {name: len(sums) for name, (sums, _) in self._measure().items()}
        self._replica.write(self._training.flat())

    def facts(self) -> dict[str, Any]:
        """What the agent tells the others: public numbers only."""
        return {
            "records": self._training.records,
            "parameters": self._training.parameters,
            "layout": self._layout,
            "constants": self._training.constants_digest(),
            "outside": self._outside,
        }

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "train":
                return self._train()
            case "follow":
                return self._follow()
            case "measure":
                self._load()
                return {"measured": self._measure()}
            case "write":
                return self._write(Path(request["path"]))
        raise ValueError(f"unknown request {request['do']}")

    def _load(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        replica = self._replica.read(self._training.parameters, np.float32)
        self._training.load(replica)
        return replica

    def _train(self) -> dict[str, Any]:
        """fedavg: an update with noise; fedsgd: the sum of clipped gradients of one batch, to which the agent adds this site's share."""
        with _user_code("training"):
            work = self._training.sum_gradients if self._sums else self._training.train_round
            self._update.write(work(self._load()))
        return {"draws": self._training.draws}

    def _follow(self) -> dict[str, Any]:
        gradient = self._replica.read(self._training.parameters, np.float64)
        self._update.write(self._training.follow(gradient))
        return {"followed": True}

    def _measure(self) -> dict[str, tuple[list[float], list[float]]]:
        from privfl.dp.evaluation import measure, measure_each

        if not self._metrics or self._held_out is None or len(self._held_out) == 0:
            return {}
        with _user_code("evaluating model and metrics on the held-out records"):
            take = measure_each if self._private else measure
            return take(self._metrics, *self._training.outputs(self._held_out))

    def _write(self, path: Path) -> dict[str, Any]:
        from safetensors.torch import save_file

        self._load()
        # Copies, because tied weights share memory, and a file that loads strictly needs every name.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self._training.model.state_dict().items()}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            raise PrivflError(f"cannot write {path}: {error.strerror or error}") from error
        return {"written": str(path)}


def _check_arguments(reference: str, data: Callable[..., Any], site: str, options: dict[str, Any]) -> None:
    """Say which option is missing or too many; nothing of a record is involved yet."""
    try:
        inspect.signature(data).bind(site, **options)
    except TypeError as error:
        raise PrivflError(
            f"data ({reference}) does not fit data_options: {error}; check data_options in the experiment and in the site's file, and --sites"
        ) from None
    except ValueError:
        return  # a callable without a signature


def _said_outside(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """What data() itself says is outside the guarantee, meant for everybody; all other warnings go to the site's log as ever."""
    for warning in caught:
        if not issubclass(warning.category, OutsideGuarantee):
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    return sorted({in_one_line(w.message)[:200] for w in caught if issubclass(w.category, OutsideGuarantee)})


def _public_seed(experiment: Experiment, run: str) -> int:
    text = run if experiment.insecure_test_seed is None else str(experiment.insecure_test_seed)
    return int.from_bytes(hashlib.sha256(f"privfl initial model {text}".encode()).digest()[:8], "little") >> 1


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PrivflError(f"device {name} in the site file is not available to torch here: {in_one_line(error)[:120]}") from error
    return device


if __name__ == "__main__":
    main(sys.argv[1:])
