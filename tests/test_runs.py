"""Run folders: what is said when a run is resumed otherwise than it began."""

from dataclasses import replace

import pytest

from m2helpers.files import UserError, write_json
from m2helpers.runs import check_folder, describe
from m2helpers.settings import TrainSettings
from m2helpers.text import Codec

QUICK = TrainSettings(lora_r=2, max_steps=2, max_length=48, batch_size=2, eval_windows=2, eval_steps=2, save_steps=1)


def test_a_run_resumed_otherwise_is_told_what_differs(tiny_base, small_data, tmp_path):
    base, codec = tiny_base(), Codec(1.0)
    (tmp_path / "state.safetensors").touch()
    write_json(tmp_path / "config.json", describe(base, small_data, QUICK, codec, "trial"))
    check_folder(tmp_path, describe(base, small_data, QUICK, codec, "trial"), resume=True)
    others = [
        (base, small_data, replace(QUICK, learning_rate=1e-3, seed=7), "learning_rate 0.002 then, 0.001 now; seed 0 then, 7 now"),
        (base, replace(small_data, sha256="0" * 64, path="b.h5"), QUICK, rf"data small.h5 \({small_data.sha256[:12]}…\) then, b.h5 \(000000000000…\) now"),
        (replace(base, sha256="1" * 64), small_data, QUICK, rf"base {base.name} \({base.sha256[:12]}…\) then, {base.name} \(111111111111…\) now"),
    ]  # fmt: skip
    for other, data, settings, said in others:
        with pytest.raises(UserError, match=rf"with other settings \({said}\); give the same ones to resume$"):
            check_folder(tmp_path, describe(other, data, settings, codec, "trial"), resume=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"its config\.json is missing or not a run's; restore it, or delete the folder"
    ):
        check_folder(tmp_path, describe(base, small_data, QUICK, codec, "trial"), resume=True)
