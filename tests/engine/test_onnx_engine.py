from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mobillama.engine.onnx_engine import OnnxEngine
from mobillama.errors import CorruptDataError, UsageError
from onnx_support import logits_of, model_and_graph


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    directory = tmp_path_factory.mktemp("graph")
    return directory, model_and_graph(directory)


def test_fed_whole_in_pieces_or_again_after_truncation_the_logits_are_the_models(graph):
    directory, model = graph
    engine = OnnxEngine.load(directory, threads=1)
    ids = np.random.default_rng(1).integers(0, 256, 150).tolist()
    expected = logits_of(model, ids)
    np.testing.assert_allclose(engine.feed(ids), expected[-1], atol=2e-5)
    assert engine.length == 150
    engine.truncate(70)
    for place in range(70, 75):
        np.testing.assert_allclose(engine.feed([ids[place]]), expected[place], atol=2e-5)
    np.testing.assert_allclose(engine.feed_each(ids[75:]), expected[75:], atol=2e-5)
    engine.truncate(0)
    np.testing.assert_allclose(engine.feed(ids[:65]), expected[64], atol=2e-5)


def test_decoding_writes_into_the_same_cache(graph):
    directory, _ = graph
    engine = OnnxEngine.load(directory, threads=1)
    before = {name: part.copy() for name, part in engine._cache.items()}
    engine.feed(list(range(10)))
    for name, part in engine._cache.items():
        assert not np.array_equal(part[:, :, :10], before[name][:, :, :10])
        assert not part[:, :, 10:].any()
    after = {name: part.copy() for name, part in engine._cache.items()}
    engine.feed([3])
    for name, part in engine._cache.items():
        assert np.array_equal(part[:, :, :10], after[name][:, :, :10])
        assert part[:, :, 10].any()


def test_what_it_cannot_take_in_is_refused_and_changes_nothing(graph):
    engine = OnnxEngine.load(graph[0], threads=1)
    expected = engine.feed([1, 2, 3, 4])
    engine.truncate(3)
    for ids, said in (
        ([], "at least one"),
        ([256], "0…255"),
        ([-1], "0…255"),
        ([1] * 158, "160 tokens cannot hold 161"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.feed(ids)
        with pytest.raises(ValueError, match=said):
            engine.feed_each(ids)
    np.testing.assert_allclose(engine.feed([4]), expected, atol=2e-5)


def test_damaged_and_foreign_files_are_named(graph, tmp_path):
    directory, _ = graph
    with pytest.raises(UsageError, match="no such file"):
        OnnxEngine.load(tmp_path)
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(CorruptDataError, match=r"cannot load it \(.*External initializer.*out of bounds") as caught:
        OnnxEngine.load(tmp_path)
    assert ".cc" not in str(caught.value) and "ONNXRuntimeError" not in str(caught.value)
    (tmp_path / "model.onnx").write_bytes(b"junk" * 100)
    with pytest.raises(CorruptDataError, match=r"model\.onnx"):
        OnnxEngine.load(tmp_path)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    foreign = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [other]))
    foreign.ir_version = 10
    onnx.save(foreign, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="not made by"):
        OnnxEngine.load(tmp_path)
    graph_file = tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes((directory / "model.onnx.data").read_bytes())
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    for stated in ("junk", "[]", '{"format": "mobillama-onnx-1"}', '{"format": "mobillama-onnx-1", "shape": 3}'):
        helper.set_model_props(model, {"mobillama": stated})
        graph_file.write_bytes(model.SerializeToString())
        with pytest.raises(CorruptDataError, match="metadata are damaged"):
            OnnxEngine.load(tmp_path)
