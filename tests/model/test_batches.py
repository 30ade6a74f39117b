"""Hidden states on disk begin with the embeddings that the model itself looks up."""

import numpy as np
from jax.sharding import PartitionSpec as P

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.model.batches import Batches, embedded
from easyspec_jax.model.device import run
from easyspec_jax.parallel.mesh import MeshShape
from tests.support.models import loader, save_model


def test_embeddings_are_the_decoders(tmp_path):
    save_model(tmp_path, "granite")  # which multiplies them
    from_ = loader(open_checkpoint(tmp_path), MeshShape(1, 1))
    ids = np.random.default_rng(0).integers(300, size=(2, 9), dtype=np.int32)
    decoder = from_.decoder(())
    expected = run(from_, lambda decoder, config, ids: decoder.embed(ids), decoder, [ids], P())
    np.testing.assert_array_equal(embedded(from_.source, from_.config, ids), expected)


def test_batches_replace_each_other(tmp_path):
    batches = Batches(tmp_path)
    for number in range(2):
        batches[number] = [np.full((1, 2), number)]
    batches[1] = [np.full((1, 3), 5), np.zeros(1)]
    found = list(batches)
    assert [[array.shape for array in batch] for batch in found] == [[(1, 2)], [(1, 3), (1,)]]
    assert found[1][0].dtype == np.float32 and (found[1][0] == 5).all()
