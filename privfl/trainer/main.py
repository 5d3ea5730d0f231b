"""A site's trainer: the process that holds torch, the user's code and the records, and no key.

The agent starts it as ``python -m privfl.trainer.main SITE ...``, and it answers requests until the
agent ends. It never imports mpi4py: an MPI library in a child of a rank would take itself for that
rank.
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
from privfl.trainer.channel import Channel, Closed, SharedVector
from privfl.trainer.requests import (
    REQUESTS,
    Answer,
    Facts,
    Failed,
    Follow,
    Followed,
    Measure,
    Measured,
    Prepare,
    Request,
    Train,
    Trained,
    Write,
    Written,
)

if TYPE_CHECKING:
    from privfl.dp.training import Recipe

_PACKAGE = str(Path(__file__).parents[1])
_EVALUATING = "evaluating model and metrics on the evaluation records"


def main(arguments: list[str]) -> None:
    """Serve the agent.

    Args:
        arguments: the site, and the file descriptors of the channel, of a pipe that closes when
            the agent ends, and of the vectors replica and update.
    """
    sys.modules["mpi4py"] = None  # type: ignore[assignment]
    site, *descriptors = arguments
    channel_end, alive, replica, update = map(int, descriptors)
    threading.Thread(target=_end_with_agent, args=(alive,), daemon=True).start()
    channel = Channel(socket.socket(fileno=channel_end), REQUESTS)
    with contextlib.suppress(Closed):
        serve(channel, Trainer(site, SharedVector(replica), SharedVector(update)))


def serve(channel: Channel[Request], trainer: Trainer) -> None:
    """Answer one request after another, a failure with :class:`Failed`.

    Raises:
        Closed: If the agent ended.
    """
    log = ""
    while True:
        request = channel.receive()
        log = request.log if isinstance(request, Prepare) else log
        answer: Answer
        try:
            answer = trainer.answer(request)
        # SystemExit too: user code that calls sys.exit() must not look like a crash.
        except (Exception, SystemExit) as error:
            answer = _failure(error, log)
        sys.stdout.flush()
        channel.send(answer)


def _failure(error: BaseException, log: str) -> Failed:
    """The sentence that leaves the site, with the log that says more to its own people."""
    if not isinstance(error, PrivflError):
        traceback.print_exc()
        text = f"internal error in the trainer: {type(error).__name__}"
        return Failed(error=in_one_line(f"{text}; log: {log}"), exit_code=EXIT_OURS)
    of_user_code = error.__cause__ is not None and not isinstance(error.__cause__, PrivflError)
    where = "read what it said in" if of_user_code else "log:"
    return Failed(error=in_one_line(f"{error}; {where} {log}"), exit_code=EXIT_USER)


def _end_with_agent(alive: int) -> None:
    """End at once when the agent's end of the pipe closes, also in the middle of a long step."""
    os.read(alive, 1)
    os._exit(0)


@contextlib.contextmanager
def _user_code(what: str) -> Iterator[None]:
    """Turn whatever user code raises into one sentence that names the exception and the line.

    Guarantee: The exception's message and traceback go to the site's log and no further. A message
        may quote a record ("could not convert string to float: ..."), and the sentence leaves the
        site in the clear.
    """
    try:
        yield
    except PrivflError:
        raise
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        frames = traceback.extract_tb(error.__traceback__)
        of_user = [
            frame
            for frame in frames
            if "site-packages" not in frame.filename and not frame.filename.startswith(_PACKAGE)
        ]
        line = ""
        if of_user:
            line = f" in line {of_user[-1].lineno} of {Path(of_user[-1].filename).name}"
        raise PrivflError(f"{what} raised {type(error).__name__}{line}") from error


def recipe_of(experiment: Experiment, site: str, noise_multiplier: float | None) -> Recipe:
    """How ``site`` trains; without noise of its own if ``noise_multiplier`` is None."""
    from privfl.dp.training import Recipe

    return Recipe(
        sampling_rate=experiment.rate(site),
        noise_multiplier=noise_multiplier,
        max_grad_norm=experiment.privacy.max_grad_norm,
        local_steps=experiment.local_steps,
        optimizer=experiment.optimizer.name,
        optimizer_options=experiment.optimizer.options(),
    )


class Trainer:
    """Model, records and the local training of one site.

    Args:
        site: the name of the site.
        replica: the shared vector that the agent writes.
        update: the shared vector that the agent reads.
    """

    def __init__(self, site: str, replica: SharedVector, update: SharedVector) -> None:
        self._site, self._replica, self._update = site, replica, update

    def answer(self, request: Request) -> Answer:
        """Do what the agent asks; the first request must be :class:`Prepare`.

        Raises:
            PrivflError: If user code fails, breaks the guarantee or does not fit, or a file cannot
                be written.
        """
        match request:
            case Prepare():
                return self._prepare(request)
            case Train():
                return self._train()
            case Follow():
                return self._follow()
            case Measure():
                self._load()
                return Measured(metrics=self._measure())
            case Write():
                return self._write(Path(request.path))

    def _prepare(self, request: Prepare) -> Facts:
        import torch

        from privfl.dp.training import LocalTraining
        from privfl.noise.randomness import SeededRandomness, SystemRandomness

        experiment = Experiment.model_validate_json(request.experiment)
        folder = Path(request.folder)
        sys.path.insert(0, str(folder))
        self._private = experiment.evaluation.records == "private"
        self._sums = experiment.algorithm == "fedsgd"
        self._metrics = {
            name: load_function(f"evaluation.metrics.{name}", reference, folder)
            for name, reference in experiment.evaluation.metrics.items()
        }
        torch.set_num_threads(request.threads)
        device = _device(request.device)
        functions = {
            key: load_function(key, getattr(experiment, key), folder)
            for key in ("model", "data", "loss")
        }
        model = _make_model(experiment, functions["model"], request.run)
        train, self._evaluation, outside = _read_records(
            experiment, functions["data"], self._site, request.data_options
        )
        recipe = recipe_of(experiment, self._site, request.noise_multiplier)
        seed = experiment.insecure_test_seed
        randomness = SystemRandomness() if seed is None else SeededRandomness(seed, self._site)
        with _user_code("preparing the model"):
            self._training = LocalTraining(
                model, functions["loss"], train, recipe, randomness, device
            )
        if self._private and self._evaluates():
            with _user_code(_EVALUATING):
                self._training.check_outputs(self._evaluation)
        return self._facts(outside)

    def _facts(self, outside: Sequence[str]) -> Facts:
        # The number of ratios of each metric is fixed before training; it must be the same at all
        # sites.
        layout = {name: len(sums) for name, (sums, _) in self._measure().items()}
        self._replica.write(self._training.flat())
        return Facts(
            records=self._training.records,
            parameters=self._training.parameters,
            layout=layout,
            constants=self._training.constants_digest(),
            outside=tuple(outside),
        )

    def _evaluates(self) -> bool:
        """Whether this site has anything to measure."""
        return bool(self._metrics) and self._evaluation is not None and len(self._evaluation) > 0

    def _load(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Put the replica that the agent wrote into the model; it is returned too."""
        replica = self._replica.read(self._training.parameters, np.float32)
        self._training.load(replica)
        return replica

    def _train(self) -> Trained:
        """fedavg: an update with noise; fedsgd: the sum of clipped gradients of one batch, to
        which the agent adds this site's share of the noise.
        """
        with _user_code("training"):
            work = self._training.sum_gradients if self._sums else self._training.train_round
            self._update.write(work(self._load()))
        return Trained(draws=self._training.draws)

    def _follow(self) -> Followed:
        gradient = self._replica.read(self._training.parameters, np.float64)
        self._update.write(self._training.follow(gradient))
        return Followed()

    def _measure(self) -> dict[str, tuple[list[float], list[float]]]:
        from privfl.dp.evaluation import measure, measure_each

        if not self._evaluates():
            return {}
        with _user_code(_EVALUATING):
            measure_all = measure_each if self._private else measure
            return measure_all(self._metrics, *self._training.outputs(self._evaluation))

    def _write(self, path: Path) -> Written:
        from safetensors.torch import save_file

        self._load()
        # Copies, because tied weights share memory, and a file that loads strictly needs every
        # name.
        tensors = {
            name: tensor.detach().cpu().clone().contiguous()
            for name, tensor in self._training.model.state_dict().items()
        }
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            raise PrivflError(f"cannot write {path}: {error.strerror or error}") from error
        return Written(path=str(path))


def _make_model(experiment: Experiment, make: Callable[[], Any], run: str) -> Any:
    """The initial model, the same at all sites."""
    import torch

    # torch's own generator starts from one constant in every process; dropout must differ between
    # sites.
    torch.seed()
    with _user_code(f"model ({experiment.model})"), torch.random.fork_rng():
        # The one public seed: it makes the initial replicas equal. Noise and samples never come
        # from torch.
        torch.manual_seed(_public_seed(experiment, run))
        return make()


def _read_records(
    experiment: Experiment, data: Callable[..., Any], site: str, options: dict[str, Any]
) -> tuple[Any, Any, list[str]]:
    """The training records, the evaluation records, and what data() warns that no epsilon
    covers.
    """
    _check_arguments(experiment.data, data, site, options)
    with _user_code(f"data ({experiment.data})"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OutsideGuarantee)
            pair = data(site, **options)
        outside = _warned_outside(caught)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise PrivflError(f"data ({experiment.data}) must return a pair (train, evaluation)")
    return pair[0], pair[1], outside


def _check_arguments(
    reference: str, data: Callable[..., Any], site: str, options: dict[str, Any]
) -> None:
    """Say which option is missing or too many. No record was read yet, so the sentence may quote
    the error.
    """
    try:
        inspect.signature(data).bind(site, **options)
    except TypeError as error:
        raise PrivflError(
            f"data ({reference}) does not fit data_options: {error}; check data_options in the "
            "experiment and in the site's file, and --sites"
        ) from None
    except ValueError:
        return  # a callable without a signature


def _warned_outside(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """The texts of data()'s OutsideGuarantee warnings, which everybody is shown; all other warnings
    go to the site's log.
    """
    for warning in caught:
        if not issubclass(warning.category, OutsideGuarantee):
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return sorted(
        {in_one_line(w.message)[:200] for w in caught if issubclass(w.category, OutsideGuarantee)}
    )


def _public_seed(experiment: Experiment, run: str) -> int:
    """63 bits of a hash of the run's public name."""
    text = run if experiment.insecure_test_seed is None else str(experiment.insecure_test_seed)
    digest = hashlib.sha256(f"privfl initial model {text}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PrivflError(
            f"device {name} in the site file is not available to torch here: "
            f"{in_one_line(error)[:120]}"
        ) from error
    return device


if __name__ == "__main__":
    main(sys.argv[1:])
