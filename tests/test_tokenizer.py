"""Tokenizer, chat templates, streamed text and stop strings."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ellm_jax import tokenizer as text
from ellm_jax.tokenizer import (
    ChatTemplateError,
    Checked,
    Detokenizer,
    StopChecker,
    Tokenizer,
    TokenizerMissing,
)

CORPUS = [
    "The little cat sat on the mat, and the dog sat on the cat.",
    "Once upon a time there was a 🙂 who met a 🙃 and a 👩‍👩‍👧.",
    "你好世界，今天天气很好。",
    "naïve café — “quotes”, ½ & €5",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_backend():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(make_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture
def directory(tmp_path):
    make_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_config(directory, **config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


class TestFromDir:
    def test_reads_tokens_and_special_ones(self, directory):
        write_config(directory, bos_token={"content": "<s>"}, eos_token="</s>", pad_token=None)
        tokenizer = Tokenizer.from_dir(directory)
        assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        assert (tokenizer.token_id("bos_token"), tokenizer.token_id("eos_token")) == (0, 1)
        assert tokenizer.token_id("pad_token") is None
        assert tokenizer.vocab_size == 330
        for line in CORPUS:
            assert tokenizer.decode(tokenizer.encode(line)) == line

    def test_special_tokens_are_read_and_skipped(self, tokenizer):
        ids = tokenizer.encode("<|im_start|>the cat</s>")
        assert (ids[0], ids[-1]) == (2, 1)
        assert tokenizer.decode(ids) == "the cat"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>the cat</s>"

    def test_adds_special_tokens_where_the_file_says_so(self):
        backend = make_backend()
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        tokenizer = Tokenizer(backend)
        assert tokenizer.encode("the cat")[0] == 0
        assert tokenizer.encode("the cat", add_special_tokens=False)[0] != 0

    def test_turns_off_truncation_and_padding(self, directory):
        backend = make_backend()
        backend.enable_truncation(3)
        backend.enable_padding(length=64)
        backend.save(str(directory / "tokenizer.json"))
        tokenizer = Tokenizer.from_dir(directory)
        assert tokenizer.decode(tokenizer.encode(CORPUS[0]), False) == CORPUS[0]

    def test_a_directory_without_one(self, tmp_path):
        with pytest.raises(TokenizerMissing, match=r"no tokenizer.json in .*token ids"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[1]"])
    def test_a_broken_one(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer that .* reads"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "tokenizer_config.json is not JSON"),
            ("[]", "holds a list, not a JSON object"),
            ('{"chat_template": [{"name": "x"}]}', "must be a string, or a list of objects"),
        ],
    )
    def test_a_broken_config(self, directory, content, message):
        (directory / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_dir(directory)


LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'Today is ' + (date | default('unknown')) %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\n' + system }}
{%- if tools is not none %}
    {{- '\\nTools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
    {% endif %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}{% set end = '<|im_end|>' %}{{ message['content'] }}{{ end }}{% endgeneration %}

    {% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MISTRAL = """{{ bos_token }}{% set ns = namespace(turn=0) %}{% for message in messages %}
{%- if (message['role'] == 'user') != (ns.turn % 2 == 0) -%}
{{ raise_exception('roles must alternate user/assistant') }}{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- if message['role'] == 'user' -%}
{%- if tools and loop.last -%}[TOOLS] {{ tools | tojson(separators=(',', ':'), sort_keys=true) }}
{%- endif %}[INST] {{ message['content'] }} [/INST]
{%- else %} {{ message['content'] }}{{ eos_token }}
{%- endif %}{% endfor %}"""

USER = {"role": "user", "content": " Who <is> 'it', 你好 🙂? "}
ANSWER = {"role": "assistant", "content": "A cat."}
SYSTEM = {"role": "system", "content": "Be brief. "}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "wind & <rain> é"}}]


def with_template(source, name="default"):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(make_backend(), special, {name: source})


class TestChatTemplate:
    @pytest.mark.parametrize("source", [LLAMA3, CHATML, MISTRAL], ids=["llama3", "chatml", "mist"])
    @pytest.mark.parametrize(
        ("messages", "tools", "opening"),
        [([USER], None, True), ([USER, ANSWER, USER], TOOLS, True), ([USER, ANSWER], None, False)],
    )
    def test_writes_what_transformers_writes(self, source, messages, tools, opening):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=make_backend(), bos_token="<s>", eos_token="</s>", chat_template=source
        )
        want = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=opening, tokenize=False, date="Monday"
        )
        got = with_template(source).apply_chat_template(messages, tools, opening, date="Monday")
        assert got == want

    def test_written_out(self):
        got = with_template(LLAMA3).apply_chat_template([SYSTEM, USER])
        assert got == (
            "<s><|start|>system<|end|>\n\nBe brief."
            "<|start|>user<|end|>\n\nWho <is> 'it', 你好 🙂?<|eot|><|start|>assistant<|end|>\n\n"
        )
        got = with_template(CHATML).apply_chat_template([USER, ANSWER], add_generation_prompt=False)
        assert got == (
            "<|im_start|>system\nYou are helpful.<|im_end|>\n"
            "<|im_start|>user\n Who <is> 'it', 你好 🙂? <|im_end|>\n"
            "<|im_start|>assistant\nA cat.<|im_end|>\n"
        )
        got = with_template(MISTRAL).apply_chat_template([USER, ANSWER, USER], TOOLS)
        assert got == (
            "<s>[INST]  Who <is> 'it', 你好 🙂?  [/INST] A cat.</s>"
            '[TOOLS] [{"function":{"description":"wind & <rain> é","name":"weather"},'
            '"type":"function"}][INST]  Who <is> \'it\', 你好 🙂?  [/INST]'
        )

    def test_the_templates_own_refusal(self):
        with pytest.raises(ChatTemplateError, match="roles must alternate user/assistant"):
            with_template(MISTRAL).apply_chat_template([ANSWER])

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{% if %}", "line 1: Expected an expression"),
            ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
            ("{{ messages[0]['content'] + 1 }}", "refuses these messages"),
            ("{{ 1 // 0 }}", "refuses these messages"),
        ],
    )
    def test_broken_and_hostile_ones(self, source, message):
        with pytest.raises(ChatTemplateError, match=message):
            with_template(source).apply_chat_template([USER])

    def test_its_length_is_limited(self, monkeypatch):
        monkeypatch.setattr(text, "CHAT_CHARS_MAX", 100)
        tokenizer = with_template("{% for i in range(99) %}{{ 'x' * n }}{% endfor %}")
        assert len(tokenizer.apply_chat_template([USER], n=1)) == 99
        with pytest.raises(ChatTemplateError, match="more than 100 characters for 1 messages"):
            tokenizer.apply_chat_template([USER], n=2)

    def test_where_there_is_none(self, tokenizer):
        with pytest.raises(ChatTemplateError, match=r"no chat template 'default' .*: none"):
            tokenizer.apply_chat_template([USER])
        with pytest.raises(ChatTemplateError, match="no messages"):
            tokenizer.apply_chat_template([])

    def test_strftime_now(self):
        year = with_template("{{ strftime_now('%Y') }}").apply_chat_template([USER])
        assert int(year) > 2024

    def test_named_ones(self, directory):
        entries = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
        write_config(directory, chat_template=[*entries, {"name": "rag", "template": "R"}])
        tokenizer = Tokenizer.from_dir(directory)
        assert tokenizer.apply_chat_template([USER]) == "D"
        assert tokenizer.apply_chat_template([USER], TOOLS) == "T"
        assert tokenizer.apply_chat_template([USER], template_name="rag") == "R"
        with pytest.raises(ChatTemplateError, match="there are: default, rag, tool_use"):
            tokenizer.apply_chat_template([USER], template_name="x")

    def test_which_file_counts(self, directory):
        def written():
            return Tokenizer.from_dir(directory).apply_chat_template([USER])

        write_config(directory, chat_template="config")
        assert written() == "config"
        (directory / "chat_template.json").write_text('{"chat_template": "json"}')
        assert written() == "json"
        (directory / "chat_template.jinja").write_text("jinja 你")
        assert written() == "jinja 你"
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "rag.jinja").write_text("rag")
        assert Tokenizer.from_dir(directory).chat_templates == {"default": "jinja 你", "rag": "rag"}


class TestDetokenizer:
    @pytest.mark.parametrize("line", CORPUS)
    def test_pieces_are_the_text_and_never_half_a_character(self, tokenizer, line):
        stream = Detokenizer(tokenizer)
        pieces = [stream.feed([token]) for token in tokenizer.encode(line)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == line
        assert stream.finish() == ""

    @pytest.mark.parametrize("seed", range(20))
    def test_any_tokens_in_any_pieces(self, tokenizer, seed):
        rng = random.Random(seed)
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
        stream, got, rest = Detokenizer(tokenizer), "", ids
        while rest:
            cut = rng.randrange(1, 5)
            got, rest = got + stream.feed(rest[:cut]), rest[cut:]
        assert got + stream.finish() == tokenizer.decode(ids), f"seed {seed}"

    def test_an_unfinished_character_at_the_end(self, tokenizer):
        ids = tokenizer.encode("cat 👻")
        stream = Detokenizer(tokenizer)
        assert stream.feed(ids[:-1]) + stream.finish() == tokenizer.decode(ids[:-1])
        assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
        assert stream.finish() == ""

    def test_special_tokens(self, tokenizer):
        ids = tokenizer.encode("cat</s>")
        assert Detokenizer(tokenizer).feed(ids) == "cat"
        assert Detokenizer(tokenizer, (), False).feed(ids) == "cat</s>"

    def test_begins_after_the_prompt(self, tokenizer):
        ids = tokenizer.encode("the cat sat")
        assert Detokenizer(tokenizer, ids[:-2]).feed(ids[-2:]) == tokenizer.decode(ids[-2:])

    def test_the_first_word_keeps_its_space(self):
        # Decoders of the SentencePiece kind take the first space of a text away.
        words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3}
        backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        backend.decoder = decoders.Metaspace()
        tokenizer = Tokenizer(backend)
        assert tokenizer.decode([2, 3]) == "cats"
        assert Detokenizer(tokenizer, [1]).feed([2, 3]) == " cats"
        assert Detokenizer(tokenizer).feed([2, 3]) == "cats"

    def test_bytes_that_spoil_the_ones_before_them(self):
        # This decoder joins byte tokens: 0xFF makes the "A" before it invalid, after it is out.
        words = {"<0x41>": 0, "<0xFF>": 1, "b": 2, "<unk>": 3}
        backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        stream = Detokenizer(Tokenizer(backend))
        got = [stream.feed([token]) for token in (0, 1, 2, 2)]
        assert got[0] == "A"
        assert "".join(got).startswith("A")
        assert "".join(got).endswith("bb")


class TestStopChecker:
    def test_holds_back_what_could_become_a_stop(self):
        checker = StopChecker(["END", "\n\n"])
        assert checker.feed("one E") == Checked("one ", None)
        assert checker.feed("N") == Checked("", None)
        assert checker.feed("T\n") == Checked("ENT", None)
        assert checker.feed(" two E") == Checked("\n two ", None)
        assert checker.feed("ND three") == Checked("", "END")

    def test_includes_the_stop_when_asked(self):
        checker = StopChecker(["stop"], include_stop=True)
        assert checker.feed("please st") == Checked("please ", None)
        assert checker.feed("op here") == Checked("stop", "stop")

    def test_finish_gives_what_was_held(self):
        checker = StopChecker(["stop"])
        assert checker.feed("to sto") == Checked("to ", None)
        assert checker.finish() == "sto"
        assert checker.finish() == ""

    def test_not_armed(self):
        checker = StopChecker(["stop"])
        assert checker.feed("a stop st", armed=False) == Checked("a stop st", None)
        assert checker.feed("op") == Checked("op", None)
        assert checker.feed(" stop") == Checked(" ", "stop")

    def test_without_stops_everything_passes(self):
        assert StopChecker([]).feed("text") == Checked("text", None)

    @pytest.mark.parametrize("seed", range(200))
    def test_the_cut_into_pieces_does_not_matter(self, seed):
        rng = random.Random(seed)
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(3)]
        whole = "".join(rng.choices("abc", weights=(1, 1, 2), k=40))
        ends = [
            (end, end - len(stop), stop)
            for end in range(1, 41)
            for stop in stops
            if whole[:end].endswith(stop)
        ]
        want, stop = (whole[: min(ends)[1]], min(ends)[2]) if ends else (whole, None)
        checker, got, found, rest = StopChecker(stops), "", None, whole
        while rest and found is None:
            cut = rng.randrange(1, 7)
            piece, found = checker.feed(rest[:cut])
            got, rest = got + piece, rest[cut:]
        if found is None:
            got += checker.finish()
        assert (got, found) == (want, stop), f"seed {seed}"
