from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from mobillama.errors import CorruptDataError, UsageError
from mobillama.record.environment import environment
from mobillama.record.files import canonical_json, replaced_file, sha256_file, write_json
from mobillama.record.lock import locked
from mobillama.record.manifest import find_damage, read_manifest, verify_manifest, write_manifest
from mobillama.record.merkle import leaf_digest, merkle_root


def test_sha256_of_a_file_larger_than_a_block(tmp_path):
    data = os.urandom(3_000_001)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_canonical_json_does_not_depend_on_key_order():
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'.encode()


def test_merkle_root_equals_rfc6962_test_vectors():
    # Inputs and roots of the Certificate Transparency reference implementation.
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    leaves = [leaf_digest(bytes.fromhex(data)) for data in inputs]
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert {count: merkle_root(leaves[:count]).hex() for count in roots} == roots


def test_replaced_file_is_whole_or_untouched(tmp_path):
    path = tmp_path / "f"
    write_json(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), replaced_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_manifest_finds_every_kind_of_damage(tmp_path, harm):
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "data.bin"
    target.write_bytes(b"0123456789")
    manifest = write_manifest(tmp_path, {"format": "t-1"})
    assert read_manifest(tmp_path, "t-1") == manifest
    assert find_damage(tmp_path, manifest) is None
    if harm == "flip":
        target.write_bytes(b"0123456788")
    elif harm == "truncate":
        target.write_bytes(b"012345678")
    else:
        target.unlink()
    with pytest.raises(CorruptDataError, match=r"sub/data\.bin"):
        verify_manifest(tmp_path, manifest)


def test_manifest_of_another_format_or_none(tmp_path):
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        read_manifest(tmp_path, "t-1")
    write_manifest(tmp_path, {"format": "t-2"})
    with pytest.raises(UsageError, match="'t-2', not 't-1'"):
        read_manifest(tmp_path, "t-1")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CorruptDataError, match="not valid JSON"):
        read_manifest(tmp_path, "t-1")


def test_lock_keeps_a_second_process_out_and_dies_with_its_holder(tmp_path):
    code = (
        "import sys, pathlib, time\nfrom mobillama.record.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'a trainer'):\n print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(UsageError, match=f"process {holder.pid}"), locked(tmp_path, "a trainer"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, "a trainer"):
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())


def test_environment_names_machine_versions_and_commit(monkeypatch, tmp_path):
    import mobillama

    facts = environment()
    assert facts["machine"].endswith("cores")
    assert facts["packages"]["torch"]
    monkeypatch.setattr(mobillama, "__file__", str(tmp_path / "src" / "mobillama" / "__init__.py"))
    assert environment()["commit"] is None
    monkeypatch.setenv("MOBILLAMA_COMMIT", "abc")
    assert environment()["commit"] == "abc"
