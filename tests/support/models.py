"""Tiny random models of every family, as Hugging Face directories.

The reference to compare with is transformers' own forward pass.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from easyspec_jax.checkpoint.directory import Checkpoint, open_checkpoint
from easyspec_jax.checkpoint.tensors import Held
from easyspec_jax.draft.grouping import Layout, layout_of
from easyspec_jax.draft.refit_file import DIRECTORY, path_of, save
from easyspec_jax.draft.sites import stale_sites
from easyspec_jax.model.loader import Loader
from easyspec_jax.model.sharding import padded_vocab_size
from easyspec_jax.model.transformer import Decoder
from easyspec_jax.options import SpeculativeConfig
from easyspec_jax.parallel.mesh import ALL_AXES, Axes, MeshShape, open_mesh

transformers.utils.logging.disable_progress_bar()

LAYERS = 6

_SHAPE: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "intermediate_size": 60,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "vocab_size": 300,
}

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3": (
        transformers.LlamaConfig,
        {
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "smollm2": (
        transformers.LlamaConfig,
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {
            "hidden_size": 112,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": (
        transformers.MistralConfig,
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": False,
        },
    ),
    "llama with biases": (
        transformers.LlamaConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "phi3": (
        transformers.Phi3Config,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        },
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 1.7,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": (
        transformers.Olmo2Config,
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 30,
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 20,
            "sliding_window_pattern": 3,
        },
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 36,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 20,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    # A layer without experts, and inner channels that no mesh divides.
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 10,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}


def family_config(family: str, **options: Any) -> Any:
    """Return a transformers configuration of a family, small enough for tests."""
    kind, own = FAMILIES[family]
    return kind(**(_SHAPE | own | options))


def save_model(directory: Path, family: str, seed: int = 0, **options: Any) -> Any:
    """Write a random model with its tokenizer, and return transformers' model in float32."""
    torch.manual_seed(seed)
    config = family_config(family, **({"eos_token_id": 2, "bos_token_id": 1} | options))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Move biases and norms away from their neutral values, so that ignoring one shows.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")) or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


def save_noisy_pair(target: Path, draft: Path, family: str, **options: Any) -> None:
    """Write a random target, and as its draft a noisy copy that often agrees with it."""
    save_model(target, family, **options)
    noisy = save_model(draft, family, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    noisy.save_pretrained(draft)


def byte_tokenizer(order: int = 1) -> PreTrainedTokenizerFast:
    """Make a tokenizer of four special tokens and 256 bytes; order -1 numbers these backwards."""
    special = ["<unk>", "<bos>", "<eos>", "<pad>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())[::order]]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


def loader(
    checkpoint: Checkpoint, mesh: MeshShape, axes: Axes = ALL_AXES, *others: Checkpoint
) -> Loader:
    """Return a float32 loader of a checkpoint, its vocabulary padded as for all of them."""
    opened = open_mesh(mesh)
    configs = [c.config for c in (checkpoint, *others)]
    return Loader(
        source=checkpoint.source,
        config=checkpoint.config,
        mesh=opened,
        axes=axes,
        dtype=np.dtype(np.float32),
        vocab_rows=padded_vocab_size(opened, *configs),
        num_ids=min(c.vocab_size for c in configs),
    )


def load_target(from_: Loader) -> Decoder:
    """Load an ordinary decoder."""
    return from_.decoder([from_.layer(index) for index in range(from_.config.num_hidden_layers)])


def some_refit(checkpoint: Checkpoint, layout: Layout, noise: float = 1.0) -> Held:
    """Make projections for fuzzy passes, with biases and norms.

    noise: how far they are from the checkpoint's own.
    """
    random = np.random.default_rng(7)
    tensors: dict[str, np.ndarray] = {}
    for site in stale_sites(layout):
        norm = checkpoint.source.read(f"{site.norm}.weight").astype(np.float32)
        scale = random.uniform(1 - noise / 2, 1 + noise / 2, norm.size)
        tensors[f"{site.norm}.weight"] = norm * scale.astype(np.float32)
        for part in site.parts:
            weight = checkpoint.source.read(f"{part}.weight").astype(np.float32)
            change = 0.05 * noise * random.normal(size=weight.shape)
            bias = 0.1 * noise * random.normal(size=len(weight)).astype(np.float32)
            tensors[f"{part}.weight"] = weight + change.astype(np.float32)
            tensors[f"{part}.bias"] = bias
    return Held(tensors)


def add_refit(draft: Path, lp_size: int, directory: Path | None = None, noise: float = 1.0) -> str:
    """Write some_refit() for --lp-size, and return the directory.

    directory: by default the one that the draft's refits are found in.
    """
    opened, speculative = open_checkpoint(draft), SpeculativeConfig(lp_size=lp_size)
    layout = layout_of(speculative, opened.config.num_hidden_layers)
    path = path_of(directory or draft / DIRECTORY, speculative, layout)
    save(path, some_refit(opened, layout, noise).tensors, layout, opened)
    return str(path.parent)


BOS, EOS = "<|bos|>", "<|eos|>"
TEMPLATE = (
    BOS
    + "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    + EOS
    + "{% endfor %}[bot]"
)
TEXTS = {
    "ascii": "the cat sat on the mat",
    "accents": "Señor Łukasz naïvely ate crème brûlée",
    "cjk": "中文分詞很有意思，日本語もそうです。",
    "emoji": "ok 👍🏽 👩‍👩‍👧‍👦 done 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "replacement": "a real \ufffd in the text\ufffd",
    "lines": "one\n\n  two\t three \r\n",
}


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tiny byte-level BPE that gives plain text a BOS.

    Its merges cross characters, so that tokens end in the middle of one.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXTS["cjk"], TEXTS["ascii"]] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=True,
    )


def partition_specs(tree: Any) -> Any:
    """Return the PartitionSpec of every array in a pytree of placed arrays."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def forward(model: Decoder, mesh: Any, tokens: ArrayLike, **options: Any) -> np.ndarray:
    """Compute logits of whole texts: float32 [batch, tokens, padded vocabulary]."""
    ids = np.asarray(tokens, np.int32)

    def body(model: Decoder, ids: jax.Array) -> jax.Array:
        caches = model.init_caches(ids.shape[0], ids.shape[1])
        h, _ = model(ids, caches, jax.numpy.zeros(ids.shape[0], jax.numpy.int32), **options)
        return model.logits(h)

    specs = (partition_specs(model), P())
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=P(None, None, model.axes or None),
        check_vma=False,
    )
    return np.asarray(jax.jit(mapped)(model, ids))
