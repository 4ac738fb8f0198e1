"""The public API: `LanguageModel`, with its tokenizer, mask token and adapter, scores, generates, infills and saves."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from difflm_jax.checkpoint.converted import load_converted
from difflm_jax.checkpoint.diffusion_config import model_card
from difflm_jax.checkpoint.hf import load_params, save_pretrained
from difflm_jax.checkpoint.peft import Base, save_adapter
from difflm_jax.checkpoint.source import Source
from difflm_jax.diffusion.config import PROMPT_RULES, DiffusionConfig, Layout
from difflm_jax.distributed.mesh import row_shards
from difflm_jax.distributed.processes import by_one_process
from difflm_jax.distributed.sharding import over_rows, place, to_host
from difflm_jax.errors import UserError
from difflm_jax.models.attention import positions_of
from difflm_jax.models.config import ModelConfig
from difflm_jax.models.lora import LoraConfig, merge_lora
from difflm_jax.models.transformer import Transformer
from difflm_jax.quant import QuantConfig
from difflm_jax.sampling.answers import Answers, Request
from difflm_jax.sampling.batching import FillOptions, fill_masks
from difflm_jax.sampling.caches import Decoder
from difflm_jax.sampling.grammar.grammar import Grammar
from difflm_jax.sampling.likelihood import LogLikelihood, log_likelihoods
from difflm_jax.sampling.options import LEFT_TO_RIGHT, Sampling, left_of_preset, of_sampling, sampling_options
from difflm_jax.sampling.text import Generation, Prompt, Prompts, as_list
from difflm_jax.sampling.watch import Host, Watcher, both
from difflm_jax.view.stream import StreamerFeed


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A converted model, opened with `difflm_jax.load`. Its arrays are on the device; everything else is plain data."""

    source: Source
    model: Transformer
    params: dict[str, Any]
    tokenizer: Any
    diffusion: DiffusionConfig
    lora: dict[str, Any] | None = None
    quantization: QuantConfig | None = None
    provenance: str = ""  # the origin of the weights, if they are not those of the source
    mesh: Mesh | None = None  # the mesh that arrays are sharded over; None: one device
    adapter_knows_masks: bool = False  # the adapter was trained on masks, with a row of its own for them or the table's
    origin: "LanguageModel | None" = None  # the causal base, if it has other weights (read when asked for); else None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def mask_token_id(self) -> int:
        return self.diffusion.mask_token_id

    @property
    def attention(self) -> str:
        return self.diffusion.attention

    @property
    def block_length(self) -> int:
        return self.diffusion.block_length

    @property
    def logit_shift(self) -> bool:
        return self.diffusion.logit_shift

    @property
    def algorithm(self) -> str:
        return self.diffusion.algorithm

    @property
    def mask_is_trained(self) -> bool:
        """Whether the mask token's row of the embedding was trained."""
        return self.diffusion.mask_is_trained

    @property
    def variables(self) -> dict[str, Any]:
        """The Flax collections that the model is applied to."""
        return {"params": self.params} if self.lora is None else {"params": self.params, "lora": self.lora}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end-of-sequence token, and those of `config.json` and `generation_config.json`."""
        ids = {self.tokenizer.eos_token_id, *self.source.eos_token_ids}
        return tuple(sorted(token for token in ids if token is not None and token != self.mask_token_id))

    @property
    def pad_token_id(self) -> int:
        """The token that pads rows: the tokenizer's padding token, or its end of sequence. It is never attended to."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def with_weights(self, converted: Path | None = None, mesh: Mesh | None = None) -> "LanguageModel":
        """Returns this model with its weights read from the source, on the first device or sharded over a `mesh`.

        `converted` is a cache directory for a base that is quantised while it loads. It is not used with a mesh.
        """
        if mesh is not None:
            params = load_params(self.source, self.model.dtype, self.quantization, mesh)
            return dataclasses.replace(self, params=params, lora=self.lora and place(self.lora, mesh), mesh=mesh)
        if converted is None or self.quantization is None or self.source.stored:
            params = load_params(self.source, self.model.dtype, self.quantization)
        else:
            params = load_converted(self.source, self.model.dtype, self.quantization, converted)
        return dataclasses.replace(self, params=params)

    def with_diffusion(self, **changes: Any) -> "LanguageModel":
        """Returns a model with the same arrays and other fields of `DiffusionConfig`, such as the attention rule."""
        return dataclasses.replace(self, diffusion=dataclasses.replace(self.diffusion, **changes))

    def with_model(self, model: Transformer) -> "LanguageModel":
        """Returns a model with the same arrays and another `Transformer`, for example with remat."""
        return dataclasses.replace(self, model=model)

    def with_adapter(self, lora: dict[str, Any], lora_config: LoraConfig) -> "LanguageModel":
        """Returns the same base with another adapter. No array is copied."""
        return dataclasses.replace(self, model=self.model.clone(lora=lora_config), lora=lora)

    def base(self) -> "LanguageModel":
        """Returns the causal model that this one was converted from.

        It is `origin`, or the same weights without an adapter and with causal attention.
        """
        if self.origin is not None:
            return self._origin
        return dataclasses.replace(
            self, model=self.model.clone(lora=None), lora=None, diffusion=self.diffusion.causal()
        )

    @functools.cached_property
    def _origin(self) -> "LanguageModel":
        return self.origin if self.origin.params else self.origin.with_weights(mesh=self.mesh)

    def __call__(
        self,
        tokens_BL: Any,
        attention_mask: Any | None = None,
        prompt_lengths: Any | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, L, V] of the head at each position. No logit shift is applied.

        `attention_mask` [B, L]: 1 = real token, padding on either side. `prompt_lengths` [B] counts the real tokens of
        each prompt. Attention "prefix", "block" and "causal_context" depend on it. Without it they treat rows as having
        no prompt, and warn, because that is rarely intended. Raises `UserError` for ids outside
        the vocabulary.
        """
        if self.diffusion.gated:  # the adapter applies to noise only, and there is none here
            return self.base()(tokens_BL, attention_mask, prompt_lengths)
        tokens_BL = self.prompts.batch(tokens_BL)
        if prompt_lengths is None and self.attention in PROMPT_RULES:
            warnings.warn(
                f"attention={self.attention!r}: without prompt_lengths no token is part of a prompt, so that every one "
                "sees what an answer sees; give prompt_lengths (0 for rows without a prompt)",
                stacklevel=2,
            )
        valid_BL = jnp.ones_like(tokens_BL, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
        prompts_B = jnp.zeros(tokens_BL.shape[0], jnp.int32) if prompt_lengths is None else jnp.asarray(prompt_lengths)
        rows = (tokens_BL, valid_BL, prompts_B)
        if self.mesh is None:
            return _logits(self.decoder, *rows)
        extra = -len(tokens_BL) % row_shards(self.mesh)  # pad to a multiple of the row shards
        rows = [jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), mode="edge") for x in rows]
        return _logits(self.decoder, *rows)[: len(tokens_BL)]

    def generate(  # noqa: PLR0913 - the public face, kept stable
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        algorithm: str | None = None,
        seed: int = 0,
        batch_size: int = 16,
        stop: str | Sequence[str] = (),
        on_pass: Watcher | None = None,
        streamer: Any = None,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> Generation:
        """Answers prompts: a string or a list of strings (the chat template is applied), message lists, messages with
        tools as {"messages": ..., "tools": ...}, or token lists.

        An answer starts as `max_new_tokens` masks. At most `steps` forward passes, over all blocks together, commit
        them, most confident first (None: 128, or the preset of `difflm tune`). Each block takes at least one pass. No
        more passes are scheduled than there are masks (except for `remask`); those of `edit_threshold` are extra.
        `block_length` fills the answer in blocks from left to right (None: one block, or the blocks of the attention
        rule). `algorithm` ranks the masks; None: the one that other options require, else that of the adapter's
        `diffusion_config.json`. `options` are the fields of `difflm_jax.sampling.options.Sampling`.
        `tokens` are the answer up to and including one end-of-sequence token, or the one that completes a `stop`
        string; `texts` end before it. With causal attention decoding is left to right, one token per pass. `on_pass` is
        called after every forward pass with a `difflm_jax.sampling.watch.Pass`.
        `grammar` (`difflm_jax.Grammar`) constrains the whole answer; see `difflm_jax.sampling.grammar`.
        `Generation.complete` says for which rows `max_new_tokens` sufficed.
        `streamer`, for a single prompt, is one of transformers' (`put`, `end`, and `put_draft` if it has one); see
        `difflm_jax.view.stream`. It gets each token once it is final. Passes of causal draws and of a sharded model
        are not observed: it then gets the whole answer at the end.
        An adapter that drafts (`objective=draft`) decodes speculatively: at temperature 0 the tokens are those of
        `base().generate`, above it they are distributed as its draws; `steps` has no effect. So are those of other
        models with `verify="base"` (attention "prefix", "block" or "causal_context").
        """
        rows = self.prompts.all(as_list(prompts))
        if algorithm is None and grammar is not None and not grammar.is_regular and self.attention != "causal":
            algorithm, steps = LEFT_TO_RIGHT, steps or max_new_tokens
        preset = left_of_preset(self.diffusion.preset_options, {"algorithm": algorithm, **options})
        block_length = block_length or preset.get("block_length")
        if steps is None:
            steps = -(-max_new_tokens // preset["tokens_per_pass"]) if "tokens_per_pass" in preset else 128
        sampling = self._sampling(temperature, algorithm, options)
        request = Request(max_new_tokens, steps, block_length, seed, batch_size, stop, on_pass, grammar)
        if streamer is None:
            return self.answers.to(rows, sampling, request)
        feed = self._feed(streamer, rows, sampling, request)
        if self.answers.is_observed(sampling):
            request = dataclasses.replace(request, on_pass=both(on_pass, feed))
        answer = self.answers.to(rows, sampling, request)
        feed.finish(answer.tokens[0])
        return answer

    def _feed(self, streamer: Any, rows: list[np.ndarray], sampling: Sampling, request: Request) -> StreamerFeed:
        if len(rows) != 1:
            raise UserError(f"streamer: it takes the answer to one prompt, and {len(rows)} were given")
        canvas = (rows[0], request.max_new_tokens, self.mask_token_id)
        return StreamerFeed(streamer, *canvas, sampling.revises, lambda row: self.answers.cut(row, request))

    def infill(
        self,
        canvas: str | Sequence[str] | Sequence[Sequence[int]] | np.ndarray,
        steps: int = 128,
        temperature: float = 0.0,
        algorithm: str | None = None,
        seed: int = 0,
        batch_size: int = 16,
        on_pass: Watcher | None = None,
        **options: Any,
    ) -> Generation:
        """Fills exactly the masks of `canvas`: text that holds the mask token, a list of such, or token rows.

        `tokens` and `texts` are the whole canvas. What precedes the first mask is the prompt for the attention rules
        "prefix" and "block". The other arguments are those of `generate`.
        """
        if self.diffusion.gated:
            raise UserError("infill: this adapter drafts the next tokens of a text; it fills no gaps")
        rows = self.prompts.canvases(as_list(canvas))
        if "stop_at_eos" in options:
            raise UserError("stop_at_eos: infill fills every mask, wherever an end-of-sequence token stands")
        sampling = self._sampling(temperature, algorithm, options)
        self.answers.check_length(max((len(row) for row in rows), default=0))
        host = None if on_pass is None else Host(watch=on_pass)
        filled = fill_masks(self.decoder, rows, FillOptions(sampling, steps, seed, batch_size, host))
        return Generation(
            [self.answers.decode(row) for row in filled.rows], filled.rows, filled.passes, filled.committed
        )

    def log_likelihood(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str | Sequence[int]],
        samples: int = 128,
        seed: int = 0,
        batch_size: int = 16,
    ) -> LogLikelihood:
        """Returns log p(answer | prompt) in nats for each row.

        It is exact for a causal model (`base()`). For a diffusion model it is LLaDA's Monte-Carlo lower bound, with
        its standard error. Prompts are those of `generate`. An answer is tokens, or text that ends its turn as in
        training. `samples`: masked copies of each row; see `difflm_jax.sampling.likelihood`.
        """
        if isinstance(prompts, str) or isinstance(answers, str) or len(prompts) != len(answers):
            raise UserError("log_likelihood takes a list of prompts and a list of as many answers")
        rows = [self.prompts.scored(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        self.answers.check_length(max((len(prompt) + len(answer) for prompt, answer in rows), default=0))
        return log_likelihoods(
            self.base().decoder if self.diffusion.gated else self.decoder,
            [prompt for prompt, _ in rows],
            [answer for _, answer in rows],
            samples,
            seed,
            batch_size,
        )

    def save_adapter(self, directory: str | Path, notes: str = "") -> None:
        """Writes a PEFT adapter directory with `diffusion_config.json`, tokenizer and model card."""
        if self.lora is None:
            raise UserError("save_adapter: this model has no adapter")
        save_adapter(
            directory,
            jax.tree.map(to_host, self.lora),
            self.model.lora,
            Base(self.source.name, self.source.revision, self.config),
            self.diffusion_config(),
            self.tokenizer,
            notes,
        )

    def merge(self) -> "LanguageModel":
        """Returns the model with its adapter added to the weights and its mask row in the embedding.

        A quantised base is dequantised: the result is dense, in the dtype of the model.
        """
        if self.lora is None:
            raise UserError("merge: this model has no adapter")
        if self.diffusion.gated:
            raise UserError("merge: this adapter is on for drafts only; merged weights would have it everywhere")
        params = merge_lora(self.params, self.lora, self.model.lora, self.mask_token_id, self.mesh)
        trained = self.mask_is_trained or self.adapter_knows_masks or "mask_row" in self.lora
        merged = dataclasses.replace(
            self.with_diffusion(mask_is_trained=trained),
            model=self.model.clone(lora=None),
            params=params,
            lora=None,
            quantization=None,
            adapter_knows_masks=False,
            origin=dataclasses.replace(self.base(), params={}),
        )
        if self.quantization is None:
            return merged
        held = f"The adapter was added to the base as {self.quantization.format} holds it, dequantised."
        return dataclasses.replace(merged, provenance=held)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a Hugging Face checkpoint (safetensors, config, tokenizer, model card) of the weights, unchanged.

        An NF4 base is written as bitsandbytes' 4-bit checkpoint; integer formats have no such form.
        """
        if self.lora is not None:
            raise UserError("save_pretrained: the adapter is not merged: call merge() first, or save_adapter()")
        params = self.params
        if jax.process_count() > 1:  # gather sharded arrays on all processes; one writes
            params = jax.tree.map(to_host, params)
        card = model_card(self.source.name, self.diffusion_config(), self.provenance)
        write = functools.partial(
            save_pretrained,
            directory,
            params,
            self.config,
            self.source.hf_config,
            self.tokenizer,
            card,
            self.diffusion_config(),
            self.source.generation_config,
        )
        by_one_process(write, str(directory))

    def diffusion_config(self) -> dict[str, Any]:
        """Returns `diffusion_config.json`: the settings needed to decode with the weights."""
        return self.diffusion.to_json()

    @property
    def prompts(self) -> Prompts:
        """The converter of user input to tokens."""
        return Prompts(self.tokenizer, self.config.vocab_size, self.mask_token_id)

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.variables, self.model, self.diffusion, self.eos_token_ids, self.pad_token_id, self.mesh)

    @property
    def answers(self) -> Answers:
        """The converter of rows of tokens to answers."""
        return Answers(self.decoder, self.tokenizer, lambda: self.base().decoder)

    def _sampling(self, temperature: float, algorithm: str | None, options: Mapping[str, Any]) -> Sampling:
        given = {"temperature": temperature, "algorithm": algorithm, **options}
        given |= of_sampling(left_of_preset(self.diffusion.preset_options, given))
        return sampling_options(self.attention, self.algorithm, given)


@jax.jit
def _logits(decoder: Decoder, *rows: jax.Array) -> jax.Array:
    """Returns logits [B, L, V] for rows of (tokens [B, L], valid [B, L], prompt lengths [B])."""

    def logits(variables, tokens_BL, valid_BL, prompt_lengths_B):
        layout = Layout(positions_of(valid_BL), valid_BL, prompt_lengths_B)
        view = decoder.diffusion.view(layout)
        hidden_BLD = decoder.model.apply(variables, tokens_BL, layout.positions, view)
        return decoder.replace(variables=variables).logits(hidden_BLD)

    return over_rows(logits, decoder.mesh, decoder.variables, *rows)
