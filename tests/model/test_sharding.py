import numpy as np
import pytest

from easyspec_jax.model.sharding import VOCAB_BLOCK, head_layout, padded_vocab_size
from easyspec_jax.parallel.mesh import MeshShape, open_mesh
from tests.support.models import family_config

HEADS = [(9, 3), (14, 2), (32, 8), (64, 8), (28, 4), (12, 2), (5, 1), (7, 7)]


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS)
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 8, 16])
def test_every_query_head_is_computed_once_with_its_own_key_head(num_heads, num_kv_heads, shards):
    layout = head_layout(num_heads, num_kv_heads, shards)
    queries = layout.query_index.reshape(shards, layout.kv_heads, layout.group)
    assert sorted(queries[queries >= 0]) == list(range(num_heads))
    owner = np.broadcast_to(layout.kv_index[:, :, None], queries.shape)
    assert np.array_equal(
        (queries // (num_heads // num_kv_heads))[queries >= 0], owner[queries >= 0]
    )


def test_heads_that_divide_are_neither_padded_nor_copied():
    layout = head_layout(32, 8, 4)
    assert layout.query_index.tolist() == np.arange(32).reshape(4, 8).tolist()
    assert layout.kv_index.tolist() == np.arange(8).reshape(4, 2).tolist()


def test_smollm2_on_eight_shards_splits_its_key_heads_instead_of_idling():
    """With two copies of each of three key heads, no shard has more than two queries."""
    layout = head_layout(9, 3, 8)
    assert (layout.kv_heads, layout.group) == (1, 2)


def test_vocabulary_shards_are_whole_noise_blocks_for_both_models():
    from easyspec_jax.checkpoint.config import model_config

    configs = [
        model_config(family_config("qwen2", vocab_size=size).to_dict()) for size in (1000, 3000)
    ]
    rows = padded_vocab_size(open_mesh(MeshShape(2, 4)), *configs)
    assert rows >= 3000
    assert rows % (8 * VOCAB_BLOCK) == 0
