"""Configuration: what is accepted, and the one sentence for everything that is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from privfl.accounting import LARGEST_NOISE_MULTIPLIER, LEAST_NOISE_MULTIPLIER
from privfl.config import (
    Experiment,
    check_functions,
    demo_path,
    load_experiment,
    load_function,
    load_site,
    sites_folder,
    to_yaml,
)
from privfl.config.values import Noise, ValueBits
from privfl.errors import PrivflError
from privfl.secagg.parameters import LEAST_BITS, MOST_BITS
from tests.conftest import edit


def refused(path: Path, *settings: str) -> str:
    with pytest.raises(PrivflError) as caught:
        load_experiment(path, settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "privacy.target_epsilom=1",
            "unknown key 'privacy.target_epsilom'; did you mean 'target_epsilon'?",
        ),
        ("sampling_rat=0.1", "unknown key 'sampling_rat'; did you mean 'sampling_rate'?"),
        ("evaluation.metric={}", "unknown key 'evaluation.metric'; did you mean 'metrics'?"),
        ("zzz=1", "unknown key 'zzz'"),
        ("rounds=0", "rounds must be greater than or equal to 1, got 0"),
        (
            "rounds=many",
            "rounds must be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        ("rounds=true", "rounds must be a number, got true"),
        ("rounds=yes", "unable to parse string as an integer, got 'yes'"),
        ("rounds=1:30", "unable to parse string as an integer, got '1:30'"),
        ("secure_aggregation.value_bits=10000000", "value_bits must be less than or equal to 28"),
        ("secure_aggregation.range=1e-320", "range must be greater than or equal to 0.000001, got"),
        ("sampling_rate=1.5", "sampling_rate must be less than or equal to 1, got 1.5"),
        ("sampling_rate=0", "sampling_rate must be greater than 0, got 0"),
        ("sampling_rate=true", "sampling_rate must be a number, got true"),
        ("sampling_rate={aa: 0.1}", "sampling_rate must name each of the sites once; check bbb"),
        ("sites=[aa, aa]", "sites names aa more than once"),
        ("sites=[aa]", "sites must name at least two sites"),
        ("sites=[aa, 'b c']", "sites.1 must be a name"),
        ("sites=[aa, false]", "sites.1 must be a valid string, got False"),
        ("privacy.delta=1", "privacy.delta must be less than 1, got 1"),
        ("privacy.delta=0", "privacy.delta must be greater than 0, got 0"),
        (
            "privacy.noise_multiplier=0",
            "privacy.noise_multiplier must be greater than or equal to 0.01, got 0",
        ),
        (
            "privacy.noise_multiplier=.inf",
            "privacy.noise_multiplier must be less than or equal to 16384, got inf",
        ),
        (
            "privacy.target_epsilon=1",
            "privacy needs exactly one of target_epsilon and noise_multiplier",
        ),
        ("privacy.noise=none", "privacy.noise must be 'site' or 'distributed', got 'none'"),
        ("algorithm=fedprox", "algorithm must be 'fedavg' or 'fedsgd', got 'fedprox'"),
        ("optimizer.lr=-1", "optimizer.lr must be greater than 0, got -1"),
        (
            "optimizer={name: adam, lr: 1, momentum: 0.9}",
            "optimizer has momentum, which only sgd takes",
        ),
        ("optimizer.name=lion", "optimizer.name must be 'sgd', 'adam' or 'adamw', got 'lion'"),
        ("model=task.py", "model must look like file.py:function or package.module:function"),
        (
            "evaluation.records=secret",
            "evaluation.records must be 'private' or 'public', got 'secret'",
        ),
        ("evaluation.metrics={a b: 'task.py:accuracy'}", "evaluation.metrics.a b"),
        (
            "evaluation.metrics={x_mean_over_sites: 'task.py:accuracy'}",
            "must not end in _mean_over_sites",
        ),
        ("data_options={labels: {0: absent}}", "data_options.labels"),
        ("rounds", "--set rounds: write it as key.path=value"),
        ("rounds.x=1", "--set rounds.x=1: 'rounds' is not a section"),
        ("rounds=[", "--set rounds=[: the value is not valid YAML"),
    ],
)
def test_one_sentence_with_the_key(small: Path, setting: str, sentence: str):
    said = refused(small, setting)
    assert sentence in said
    assert said.startswith(("--set", str(small)))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("rounds: 2", "", "key 'rounds' is missing"),
        ("delta: 1e-5, ", "", "key 'privacy.delta' is missing"),
        ("rounds: 2", "rounds: 2\nrounds: 3", "key 'rounds' stands twice"),
        ("rounds: 2", "rounds: [", "is not valid YAML"),
        ("rounds: 2", "rounds: 2\nround: 3", "unknown key 'round'; did you mean 'rounds'?"),
    ],
)
def test_broken_files(small: Path, old: str, new: str, sentence: str):
    edit(small, old, new)
    assert sentence in refused(small)


def test_files_that_are_none(tmp_path: Path):
    assert "cannot read the experiment file" in refused(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "must hold keys and values, it holds a list" in refused(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "is missing" in refused(tmp_path / "empty.yaml")
    (tmp_path / "unsafe.yaml").write_text("rounds: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in refused(tmp_path / "unsafe.yaml")


def options(small: Path, text: str) -> Path:
    """The experiment with these data_options."""
    edit(small, "\nmodel:", f"\ndata_options: {text}\nmodel:")
    return small


def nested_aliases(levels: int) -> str:
    """Ten lists of ten lists of ten ..., written with aliases."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return f"{{{', '.join(lines)}}}"


def test_aliases_are_written_out(small: Path):
    experiment = load_experiment(options(small, "{a: &a [1, 2], b: {c: *a}, d: *a}"))
    assert experiment.data_options == {"a": [1, 2], "b": {"c": [1, 2]}, "d": [1, 2]}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (nested_aliases(12), "aliases repeat more than 100000 values"),
        ("{a: &a [*a]}", "an alias stands inside of what it repeats"),
        ("{a: &a {b: {c: *a}}}", "an alias stands inside of what it repeats"),
    ],
)
def test_aliases_without_end(small: Path, text: str, sentence: str):
    assert sentence in refused(options(small, text))


@pytest.mark.parametrize("text", [r'{x: "\ud800"}', r'{x: [{y: "a\udfff"}]}', r'{"\ud800": 1}'])
def test_half_a_character(small: Path, text: str):
    """The trainer gets the experiment as JSON in UTF-8, which cannot hold it."""
    assert "half of a character" in refused(options(small, text))
    assert "not valid YAML" in refused(small, f"data_options={text}")


@pytest.mark.slow
def test_large_mappings_take_no_longer_than_large_lists(small: Path):
    def seconds(text: str) -> float:
        start = time.process_time()
        load_experiment(small, [f"data_options={text}"])
        return time.process_time() - start

    numbers = range(8000)
    mapping = "{" + ", ".join(f"k{i}: v" for i in numbers) + "}"
    pairs = "{x: [" + ", ".join(f"k{i}, v" for i in numbers) + "]}"
    assert seconds(mapping) < 2.0 * seconds(pairs) + 0.2


def test_settings_go_over_the_file(small: Path):
    experiment = load_experiment(
        small, ["rounds=7", "privacy.noise_multiplier=3", "data_options.shift=0.5"]
    )
    assert (experiment.rounds, experiment.privacy.noise_multiplier, experiment.data_options) == (
        7,
        3.0,
        {"shift": 0.5},
    )
    assert experiment.privacy.delta == 1e-5, "YAML reads 1e-5 as a string"


def test_a_rate_per_site(small: Path):
    experiment = load_experiment(small, ["sampling_rate={aa: 0.1, bbb: 1}"])
    assert (experiment.rate("aa"), experiment.rate("bbb")) == (0.1, 1.0)


def test_the_digest_covers_everything_but_where_outputs_go(small: Path):
    def digest(*settings: str) -> str:
        return load_experiment(small, settings).digest()

    assert digest() == digest() == digest("output=elsewhere")
    others = [
        "rounds=3",
        "privacy.delta=1e-6",
        "data_options.x=1",
        "optimizer.lr=0.3",
        "insecure_test_seed=1",
        "sites=[bbb, aa]",
    ]
    assert len({digest(), *map(digest, others)}) == len(others) + 1


def test_experiments_are_frozen_and_survive_json(small: Path):
    experiment = load_experiment(small)
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    with pytest.raises(ValueError, match="frozen"):
        experiment.rounds = 3


def test_the_demo_is_a_valid_experiment():
    experiment = load_experiment(demo_path())
    check_functions(experiment, demo_path().parent)
    assert len(experiment.sites) == 4
    assert experiment.evaluation.records == "public"


# -- site files --------------------------------------------------------


def test_site_files_have_their_own_paths(tmp_path: Path):
    (tmp_path / "aa.yaml").write_text(
        "data_options: {folder: /data}\ndevice: cuda:1\noutput: out\nlog: /var/log/aa.log\n"
    )
    found = load_site(tmp_path, "aa")
    assert found.data_options == {"folder": "/data"}
    assert found.device == "cuda:1"
    assert found.output == str(tmp_path / "out")
    assert found.log == "/var/log/aa.log"
    assert load_site(None, "aa").device == "cpu"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("devise: cpu", "unknown key 'devise'; did you mean 'device'?"),
        ("device: gpu", "device must be cpu, mps, cuda or cuda:N, got 'gpu'"),
        ("data_options: 3", "data_options must be a valid dictionary, got 3"),
    ],
)
def test_broken_site_files(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "aa.yaml").write_text(text)
    with pytest.raises(PrivflError) as caught:
        load_site(tmp_path, "aa")
    assert sentence in str(caught.value)
    assert str(tmp_path / "aa.yaml") in str(caught.value)


def test_site_files_are_beside_the_experiment_or_where_one_says(tmp_path: Path):
    experiment, beside = tmp_path / "experiment.yaml", tmp_path / "sites"
    assert sites_folder(experiment, None, without=False) is None
    beside.mkdir()
    assert sites_folder(experiment, None, without=False) is None
    (beside / "aa.yaml").touch()
    assert sites_folder(experiment, None, without=False) == beside
    assert sites_folder(experiment, None, without=True) is None
    assert sites_folder(experiment, tmp_path, without=False) == tmp_path
    assert sites_folder(None, None, without=False) is None
    with pytest.raises(PrivflError, match="leave one out"):
        sites_folder(experiment, tmp_path, without=True)


@pytest.mark.parametrize("text", ["1e5", "12e03", "no", "010", "~", "true", "2026-01-01", "0x10"])
def test_what_is_written_is_read_back(small: Path, tmp_path: Path, text: str):
    experiment = load_experiment(small).model_copy(update={"data_options": {"x": text}})
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(experiment))
    assert load_experiment(again) == experiment


def test_a_missing_site_file_is_an_error(tmp_path: Path):
    with pytest.raises(PrivflError, match=r"cannot read the file of site aa .*aa\.yaml"):
        load_site(tmp_path, "aa")


# -- user functions --------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model=task.py:modle", r"model: .*task\.py defines no 'modle'; did you mean 'model'\?"),
        ("loss=tusk.py:loss", r"loss: cannot read .*tusk\.py: No such file"),
        (
            "evaluation.metrics.accuracy=task.py:acuracy",
            r"evaluation\.metrics\.accuracy: .*did you mean 'accuracy'\?",
        ),
    ],
)
def test_functions_are_checked_without_running_code(small: Path, setting: str, sentence: str):
    (small.parent / "task.py").write_text(
        (small.parent / "task.py").read_text() + "\nraise SystemExit('must not run')\n"
    )
    experiment = load_experiment(small, [setting])
    with pytest.raises(PrivflError, match=sentence):
        check_functions(experiment, small.parent)


def test_code_that_is_not_python(small: Path):
    (small.parent / "task.py").write_text("def model(:\n")
    with pytest.raises(PrivflError, match="not valid Python"):
        check_functions(load_experiment(small), small.parent)


def test_loading_functions(small: Path):
    assert load_function("loss", "math:hypot", small.parent)(3, 4) == 5.0
    assert load_function("loss", "task.py:loss", small.parent).__name__ == "loss"
    for reference, sentence in [
        ("math:nothing_like_it", "math has no function 'nothing_like_it'"),
        ("math:pi", "has no function 'pi'"),
        ("no_such_package:f", "importing no_such_package raised ModuleNotFoundError"),
    ]:
        with pytest.raises(PrivflError, match=sentence):
            load_function("loss", reference, small.parent)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("1e-5", 1e-5),
        ("1.5E3", 1500.0),
        (".inf", float("inf")),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-13-45", "2026-13-45"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(small: Path, text: str, value: object):
    loaded = load_experiment(small, [f"data_options.x={text}"]).data_options["x"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_bits_have_the_limits_of_the_sums():
    schema = TypeAdapter(ValueBits).json_schema()
    assert (schema["ge"], schema["le"]) == (LEAST_BITS, MOST_BITS)


def test_noise_has_the_limits_of_the_accountants():
    """Configuration imports no other package, so the two numbers stand twice."""
    noise = TypeAdapter(Noise)
    for inside in (LEAST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER):
        assert noise.validate_python(inside) == inside
    for outside in (LEAST_NOISE_MULTIPLIER * 0.999, LARGEST_NOISE_MULTIPLIER * 1.001):
        with pytest.raises(ValueError, match="or equal to"):
            noise.validate_python(outside)
