"""The commands as a user runs them."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenized import add_tokenizer

from ellm_jax import Engine, EngineConfig, SamplingParams, StructuredOutput
from ellm_jax.cli import main, options

_SMALL = ["--quiet", "--no-warm-up", "--max-batch-tokens", "32", "--device-memory", "32MiB"]


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are the words w0 to w511."""
    return add_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("words") / "model")


def _expected(model: Path, prompt: str | list[dict[str, str]], **params: typing.Any) -> str:
    """What the engine itself says, greedily."""
    config = EngineConfig(
        device_memory="32MiB", max_num_seqs=1, max_batch_tokens=32, warm_up=False, progress=False
    )
    with Engine.from_pretrained(model, config) as engine:
        sampling = SamplingParams(temperature=0.0, **params)
        return engine.generate(prompt, sampling)[0].text  # type: ignore[arg-type]


def _generate(model: Path, *args: str) -> int:
    return main(["generate", "--model", str(model), "--temperature", "0", *_SMALL, *args])


def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    commands = (
        ["generate"],
        ["batch"],
        ["bench"],
        ["bench", "offline"],
        ["bench", "peers"],
        ["bench", "quality"],
        ["bench", "workload"],
        ["convert"],
        ["doctor"],
    )
    for command in ([], *commands):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, StructuredOutput])
def test_every_field_has_an_option_with_help(cls: type) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    options.add_engine_options(parser)
    options.add_sampling_options(parser)
    actions = {action.dest: action for action in parser._actions}
    for field in dataclasses.fields(cls):
        if field.name == "structured":
            continue  # its own fields have options
        action = actions[f"{cls.__name__}.{field.name}"]
        assert action.help, field.name
        assert "None" not in action.help, f"{field.name}: None is no word of a command line"


def test_options_reach_the_dataclasses() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    options.add_engine_options(parser)
    options.add_sampling_options(parser, max_tokens=7)
    line = "--device-memory 2GiB --max-num-seqs 3 --no-warm-up --quiet --dtype bfloat16"
    line += " --n 2 --stop a --stop b --stop-token-ids 4 --logit-bias 5=-1.5 --logit-bias 6=2"
    line += " --ignore-eos --no-skip-special-tokens --seed 9 --choice yes --choice no"
    args = parser.parse_args(line.split())
    assert options.engine_config(args) == EngineConfig(
        device_memory="2GiB", max_num_seqs=3, warm_up=False, progress=False, dtype="bfloat16"
    )
    assert options.sampling_params(args, max_tokens=7) == SamplingParams(
        n=2,
        stop=["a", "b"],
        stop_token_ids=[4],
        logit_bias={5: -1.5, 6: 2},
        ignore_eos=True,
        skip_special_tokens=False,
        seed=9,
        max_tokens=7,
        structured=StructuredOutput(choice=["yes", "no"]),
    )


def test_one_prompt_is_streamed_to_standard_output(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _generate(model, "w5 w6 w7", "--max-tokens", "12", "--echo") == 0
    said = capsys.readouterr()
    assert said.out == f"w5 w6 w7{_expected(model, 'w5 w6 w7', max_tokens=12)}\n"
    assert said.err == ""


def test_the_summary_names_tokens_and_owners(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [arg for arg in _SMALL if arg != "--quiet"]
    command = ["generate", "w5", "--model", str(model), "--max-tokens", "3", "--ignore-eos"]
    assert main([*command, *args, "--stats"]) == 0
    said = capsys.readouterr().err
    assert "3 tokens in" in said
    assert "weights" in said
    assert "limit 32.00 MiB" in said
    assert "host loop" in said


def test_prompts_from_standard_input_become_json_in_their_order(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["w5 w6", "w9", "w7 w8 w9"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(prompts) + "\n"))
    assert _generate(model, "--max-tokens", "5", "--json", "--logprobs", "1") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        (output,) = line["outputs"]
        assert output["text"] == _expected(model, line["prompt"], max_tokens=5)
        assert [entry["token_id"] for entry in output["logprobs"]] == output["token_ids"]
        assert line["metrics"]["ttft_ms"] > 0


def test_several_prompts_are_told_apart(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts"
    file.write_text("w5\r\nw6\n")
    assert _generate(model, "--input", str(file), "--max-tokens", "2", "--ignore-eos") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["--- w5", "--- w6"]


def test_a_chat_goes_through_the_template(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _generate(model, "--chat", "--system", "w8", "w9", "--max-tokens", "6") == 0
    chat = [{"role": "system", "content": "w8"}, {"role": "user", "content": "w9"}]
    assert capsys.readouterr().out == _expected(model, chat, max_tokens=6) + "\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "x", "--model", "/nowhere"], "/nowhere does not exist"),
        (["generate", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "x", "--device-memory", "lots"], "'lots' is no size"),
        (["generate", "x", "--dtype", "int8"], "float32 or bfloat16"),
        (["generate", "x", "--system", "y"], "--chat"),
        (["generate", "x", "--input", "y"], "give one of them"),
        (["generate", "--input", "/nowhere"], "/nowhere cannot be read"),
        (["generate"], "has no prompts"),
        (["convert", "/nowhere", "/tmp/never"], "/nowhere does not exist"),
        (["batch", "/nowhere", "/tmp/never"], "/nowhere is not a file"),
        (["batch", __file__, "/nowhere/out"], "/nowhere does not exist"),
        (["batch", __file__, __file__], "cannot take the results"),
        (["bench", "offline", "--workload", "/nowhere"], "/nowhere cannot be read"),
        (["bench", "offline", "--workload", __file__], "line 1:"),
    ],
)
def test_mistakes_are_told_in_a_line(
    command: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("ellm: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["w5 " * 300], "shorten the prompt"),
        ([""], "the prompt is empty"),
        (["w5", "--logit-bias", "9999=1"], "outside the vocabulary"),
        (["w5", "--max-model-len", "100000"], "the model's context is 256"),
        (["w5", "--device-memory", "1MiB"], "the weights alone take"),
    ],
)
def test_what_the_model_cannot_do_is_told_in_a_line(
    model: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _generate(model, *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["generate", "x", "--logit-bias", "y"],
        ["bench", "workload", "--rate", "0"],
        ["bench", "workload", "--rate", "1e-320"],
        ["bench", "workload", "--prompt-len", "9:3"],
        ["bench", "workload", "--prompt-len", f"1:{10**30}"],
        ["bench", "offline"],
    ],
)
def test_wrong_arguments_end_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


class _InterruptedAtFirstText(io.StringIO):
    def write(self, text: str) -> int:
        signal.raise_signal(signal.SIGINT)
        return len(text)


def test_an_interrupt_ends_cleanly(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", _InterruptedAtFirstText())
    # A job that a shell runs in the background, as tests may, begins with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert _generate(model, "w5", "--max-tokens", "200", "--ignore-eos") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nellm: interrupted\n"


@pytest.mark.parametrize("name", ["-", "file"])
def test_input_that_is_no_text_is_told_in_a_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"w5\n\xff\n")
    # What Python makes of standard input in the C locale.
    with file.open(encoding="ascii", errors="surrogateescape") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate", "--input", "-" if name == "-" else str(file)]) == 2
    error = capsys.readouterr().err
    assert "is not UTF-8 text" in error
    assert error.count("\n") == 1


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ellm_jax", "bench", "workload", "--requests", "20000"]
    reader, writer = os.pipe()
    os.close(reader)
    # Elsewhere: in its own directory Python would import the sources, not what is installed.
    ended = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, check=False, cwd=tmp_path
    )
    os.close(writer)
    assert ended.returncode == 141
    assert ended.stderr == b""


def test_the_command_line_starts_without_jax(tmp_path: Path) -> None:
    check = "import sys, ellm_jax.cli, ellm_jax.doctor; sys.exit('jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-P", "-c", check], check=False, cwd=tmp_path)
    assert ended.returncode == 0


def test_a_converted_model_says_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "converted"
    assert main(["convert", str(model), str(target), "--json", "--quiet"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["path"] == str(target)
    assert written["dtype"] == "float32"
    assert _generate(target, "w5 w6", "--max-tokens", "8") == 0
    assert capsys.readouterr().out == _expected(model, "w5 w6", max_tokens=8) + "\n"
    assert main(["convert", str(model), str(target), "--quiet"]) == 2
    assert "not an empty directory" in capsys.readouterr().err


def test_a_batch_file_runs_and_goes_on_after_an_interruption(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "w9"}], "max_tokens": 4}
    bodies = [
        ("a", "/v1/completions", {"prompt": "w5 w6", "max_tokens": 6}),
        ("b", "/v1/completions", {"prompt": [5, 6], "max_tokens": 6, "logprobs": 1}),
        ("c", "/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2, "n": 2}),
        ("d", "/v1/completions", {"prompt": [5, 600]}),
        ("e", "/v1/completions", {"prompt": "w7", "stop": "w"}),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "\n".join(
            json.dumps({"custom_id": key, "method": "POST", "url": url, "body": body})
            for key, url, body in bodies
        )
    )
    command = ["batch", str(source), str(target), "--model", str(model), "--json", *_SMALL]
    command += ["--temperature", "0", "--served-name", "tiny", "--max-tokens", "3"]
    command += ["--max-num-seqs", "2"]
    assert main(command) == 0
    said = capsys.readouterr()
    counts = json.loads(said.out)
    assert (counts["completed"], counts["failed"], counts["skipped"]) == (4, 1, 0)
    assert said.err == f"ellm: 1 of 5 lines failed; {target} says why\n"

    written = target.read_text()
    results = {line["custom_id"]: line for line in map(json.loads, written.splitlines())}
    body = {key: line["response"]["body"] for key, line in results.items()}
    expected = _expected(model, "w5 w6", max_tokens=6)
    assert body["a"]["choices"][0]["text"] == body["b"]["choices"][0]["text"] == expected
    assert body["a"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    assert body["a"]["model"] == "tiny"
    assert len(body["b"]["choices"][0]["logprobs"]["tokens"]) == 6
    assert [choice["index"] for choice in body["c"]["choices"]] == [0, 1]
    assert len(body["c"]["choices"][1]["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert results["d"]["response"]["status_code"] == 400
    assert "token id 600" in body["d"]["error"]["message"]
    ended = body["e"]["choices"][0]
    assert ended["text"].strip() == ""
    assert ended["finish_reason"] == "stop"

    lines = written.splitlines(keepends=True)
    target.write_text("".join(lines[:-1]) + lines[-1][:40])
    assert main(command) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["completed"] + counts["failed"] == 1
    assert counts["skipped"] == 4
    keys = [json.loads(line)["custom_id"] for line in target.read_text().splitlines()]
    assert sorted(keys) == ["a", "b", "c", "d", "e"]


def test_the_doctor_tries_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["works"]
    names = {finding["name"]: finding for finding in report["findings"]}
    assert names["python"]["value"] == sys.version.split()[0]
    assert names["generation"]["value"].startswith("4 tokens")
    assert names["virtual memory"]["level"] == "ok"
    for finding in report["findings"]:
        assert finding["level"] == "ok" or finding["remedy"], finding


def test_the_doctor_names_what_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> int:
        raise RuntimeError("no /proc")

    monkeypatch.setattr("ellm_jax.doctor.free_memory_bytes", broken)
    monkeypatch.setattr("ellm_jax.assembly.TINY_MODEL", tmp_path)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "x memory: failed: no /proc" in said
    assert "x model in the package: missing" in said
    assert "-> " in said
