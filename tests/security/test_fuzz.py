"""Untrusted files, mutated: a reader gives what it can vouch for or raises `UserError`, in bounded time and memory.

`FUZZ_EXAMPLES=5000 pytest tests/security --hypothesis-show-statistics` runs more and counts what was accepted.
"""

import json
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from difflm_jax.checkpoint.diffusion_config import DIFFUSION_FILE, read_diffusion_config
from difflm_jax.checkpoint.gguf.weights import open_gguf
from difflm_jax.checkpoint.hf import check_tensors
from difflm_jax.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from difflm_jax.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, open_shards, write_file
from difflm_jax.checkpoint.source import open_source as open_model
from difflm_jax.config.files import from_json, load_config
from difflm_jax.data.chat import encode_chat
from difflm_jax.data.formats import parse_row
from difflm_jax.data.sources import RowError, open_source
from difflm_jax.errors import UserError
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.rope import inverse_frequencies
from tests.byte_tokenizer import byte_tokenizer
from tests.tiny import HF, tiny_config

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**40, "", "..", "/etc/passwd", "F8_E4M3", "yarn", "linear", "llama3"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """An allocation of what a header claims is an error here, not a machine that swaps."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@st.composite
def mutations(draw, data: bytes, header: int) -> bytes:
    """`data` with a few bytes, 8-byte lengths or slices changed, mostly in its first `header` bytes."""
    mutated = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not mutated:
            break
        at = draw(st.integers(0, min(header, len(mutated)) - 1 if draw(st.integers(0, 3)) else len(mutated) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                mutated[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                mutated[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**16, 2**31, 2**40, 2**63])))
            case 2:
                mutated[at : at + 1] = draw(st.binary(max_size=6))
            case 3:
                mutated = mutated[: at + 1]
            case _:
                number = str(draw(st.sampled_from([0, 7, 2**33, 2**64]))).encode()
                mutated[at : at + len(number)] = number
    return bytes(mutated)


def settled(action) -> bool:
    """Whether `action` accepted its input; anything but a refusal in one line is a failure of the test."""
    try:
        action()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        event("refused")
        return False
    event("accepted")
    return True


def safetensors() -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}.safetensors"
    path.touch()
    write_file(path, {"a": np.ones((2, 3), np.float32), "b.weight": np.ones(4, np.float16)})
    try:
        return path.read_bytes()
    finally:
        path.unlink()


SAFETENSORS = safetensors()


@fuzz
@given(data=mutations(SAFETENSORS, len(SAFETENSORS) - 32))
def test_safetensors(tmp_path, data):
    (tmp_path / SINGLE_FILE).write_bytes(data)

    def read():
        files = open_shards(tmp_path)
        if not files.defects:
            for name, shape in files.shapes.items():
                assert files.read(name).shape == shape

    settled(read)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9, 0])
def test_a_safetensors_header_longer_than_the_file_is_refused_unread(tmp_path, length):
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", length) + SAFETENSORS[8:])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_shards(tmp_path)


@fuzz
@given(weight_map=st.one_of(values, st.dictionaries(st.text(max_size=8), values, max_size=4)))
def test_an_index_never_leads_out_of_its_directory(tmp_path, weight_map):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert not settled(lambda: open_shards(tmp_path))


def gguf_bytes(directory: Path) -> bytes:
    path = directory / "model.gguf"
    writer = GGUFWriter(path, "qwen3")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 3])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((32, 18), np.uint8), raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@fuzz
@given(data=st.data())
def test_gguf(tmp_path, data):
    whole = gguf_bytes(tmp_path)
    path = tmp_path / "mutated.gguf"
    path.write_bytes(data.draw(mutations(whole, len(whole) - 600)))

    def read():
        _, files, load_tokenizer = open_gguf(path)
        for name, shape in files.shapes.items():
            assert files.read(name).shape == shape
        load_tokenizer()

    settled(read)


@pytest.mark.parametrize("what", ["array", "tensors", "string"])
def test_a_gguf_length_beyond_the_file_is_refused_before_it_is_believed(tmp_path, what):
    whole = bytearray(gguf_bytes(tmp_path))
    huge = struct.pack("<Q", 2**40)
    if what == "tensors":
        whole[8:16] = huge
    elif what == "array":  # type 5 (int32) of token_type, then its length
        at = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
        whole[at : at + 8] = huge
    else:
        whole[24:32] = huge
    (tmp_path / "huge.gguf").write_bytes(whole)
    with pytest.raises(UserError, match="not a complete GGUF file"):
        open_gguf(tmp_path / "huge.gguf")


@fuzz
@given(changes=st.dictionaries(st.one_of(st.sampled_from(sorted({
    *HF, "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_types", "sliding_window",
    "use_sliding_window", "partial_rotary_factor", "quantization_config", "num_experts",
})), st.text(max_size=6)), values, min_size=1, max_size=3))  # fmt: skip
def test_model_config(changes):
    def read():
        config = ModelConfig.from_hf({**HF, **changes})
        if config.head_dim < 10_000:
            frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
            assert np.isfinite(frequencies).all() and np.isfinite(factor)

    settled(read)


@fuzz
@given(text=st.one_of(values.map(json.dumps), st.text(max_size=40)), kind=st.sampled_from(["json", "yaml"]))
def test_run_config(tmp_path, text, kind):
    path = tmp_path / f"config.{kind}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    settled(lambda: load_config(str(path)))
    settled(lambda: from_json(text))


@fuzz
@given(changes=st.dictionaries(st.sampled_from(
    ["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "trainable_token_indices", "exclude_modules",
     "peft_type", "bias", "init_lora_weights", "modules_to_save", "base_model_name_or_path"]
), values, min_size=1, max_size=3))  # fmt: skip
def test_adapter_config(tmp_path, changes):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    write_file(tmp_path / WEIGHTS_FILE, {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{name}.weight": np.zeros(shape, np.float32)
        for layer in range(3) for name, shape in (("A", (2, 32)), ("B", (64, 2)))
    })  # fmt: skip
    settled(lambda: load_adapter(tmp_path, tiny_config()))


@fuzz
@given(content=st.one_of(values, st.dictionaries(
    st.sampled_from(["mask_token", "mask_token_id", "attention", "logit_shift", "algorithm"]), values
)))  # fmt: skip
def test_diffusion_config(tmp_path, content):
    (tmp_path / DIFFUSION_FILE).write_text(json.dumps(content))
    settled(lambda: read_diffusion_config(tmp_path))


keys = st.sampled_from(
    ["messages", "conversations", "prompt", "response", "completion", "question", "answer", "instruction", "output",
     "input", "text", "tools", "system"]
)  # fmt: skip
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"])
message = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), st.one_of(values, roles)
)
plain_message = st.fixed_dictionaries({"role": roles, "content": st.text(max_size=9)})


@fuzz
@given(
    row=st.one_of(
        values,
        st.dictionaries(keys, st.one_of(values, st.lists(message, max_size=3))),
        st.fixed_dictionaries({"messages": st.lists(st.one_of(plain_message, message), max_size=4)}),
        st.fixed_dictionaries({"question": st.text(max_size=9), "answer": st.one_of(st.text(max_size=9), values)}),
    )
)
def test_rows(row):
    tokenizer = byte_tokenizer()

    def read():
        _, parsed = parse_row(row)
        if not isinstance(parsed, str):
            encode_chat(tokenizer, parsed.messages, tools=parsed.tools)

    settled(read)


PARQUET = pa.BufferOutputStream()
pyarrow.parquet.write_table(pa.table({"question": ["a", "b"], "answer": ["c", "d"]}), PARQUET)
PARQUET = PARQUET.getvalue().to_pybytes()
JSONL = b'{"question": "1+1", "answer": "2"}\n{"messages": [{"role": "user", "content": "x"}]}\n'


@fuzz
@given(data=st.one_of(
    st.tuples(st.just(".jsonl"), mutations(JSONL, len(JSONL))),
    st.tuples(st.just(".json"), mutations(b'[{"text": "a"}, {"text": "b"}]', 30)),
    st.tuples(st.just(".txt"), st.binary(max_size=60)),
    st.tuples(st.just(".parquet"), mutations(PARQUET, len(PARQUET))),
))  # fmt: skip
def test_data_files(tmp_path, data):
    ending, content = data
    (tmp_path / f"rows{ending}").write_bytes(content)

    def read():
        for row in open_source(str(tmp_path / f"rows{ending}")).rows():
            try:
                parse_row(row.load())
            except RowError:
                event("bad row")

    settled(read)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_json_that_is_too_deep_or_too_long_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_model(str(tmp_path))
    with pytest.raises(UserError, match="no valid JSON"):
        load_config(str(tmp_path / "config.json"))
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    with pytest.raises(RowError, match="not JSON"):
        next(open_source(str(tmp_path / "rows.jsonl")).rows()).load()


def test_a_config_of_a_billion_layers_makes_no_list_of_them():
    with pytest.raises(UserError, match="num_hidden_layers=1000000000 is too large"):
        ModelConfig.from_hf({**HF, "num_hidden_layers": 10**9})


HOSTILE_TEMPLATES = {
    "the classes of Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a function's globals": "{{ raise_exception.__globals__ }}",
    "an import": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "changing the conversation": "{{ messages.append(messages[0]) }}",
    "a loop without end": "{% for i in range(999999999999) %}{% endfor %}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_a_chat_template_runs_in_a_sandbox(template):
    tokenizer = byte_tokenizer(template=HOSTILE_TEMPLATES[template])
    with pytest.raises(RowError, match=r"the chat template (refuses it|shows nothing of the answer|changes earlier)"):
        encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_code_that_a_checkpoint_brings_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "model.py").write_text(f"open({str(marker)!r}, 'w')")
    hf = {**HF, "auto_map": {"AutoModelForCausalLM": "model.Model", "AutoConfig": "model.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    write_file(tmp_path / SINGLE_FILE, {"a": np.ones(2, np.float32)})
    with pytest.raises(UserError, match="auto_map"):
        check_tensors(open_model(str(tmp_path)))
    assert not marker.exists()


def test_a_name_cannot_speak_to_the_terminal():
    assert str(UserError("tensor \x1b[2J\r\nok \ud800 é")) == r"tensor \x1b[2J\r\nok \ud800 é"
