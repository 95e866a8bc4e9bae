"""The recorder against gates read by hand, spectra against a dense SVD, and the page itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from mole_kernels.cli.app import app
from mole_kernels.demo.model import ASSETS, load_pipeline
from mole_kernels.errors import MoleStateError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.gates.schedule import Clock, switch
from mole_kernels.io.save import save_expert
from mole_kernels.patching.apply import patch
from mole_kernels.patching.patched import GateMap
from mole_kernels.reports.plots import maps_of_layers
from mole_kernels.reports.record import Recorder, latent_grid, layer_kind, whole_gate
from mole_kernels.reports.report import bank_spectra, rank_for, report_page
from tests.tiny_models import make_expert, run_unet, tiny_unet


def test_the_whole_gate_is_the_product_of_its_parts():
    token, sample, given = torch.rand(2, 5, 3), torch.rand(2, 3), torch.rand(1, 5, 3)
    torch.testing.assert_close(
        whole_gate(GateMap(token, sample, ("a", "b", "c"), given)), token * sample[:, None] * given
    )
    assert torch.equal(whole_gate(GateMap(None, None, ("a",))), torch.ones(1, 1, 1))


@pytest.mark.parametrize(
    "tokens, size, want",
    [
        (108, (6, 18), (6, 18)),
        (27, (6, 18), (3, 9)),
        (5, (6, 18), None),
        (77, (64, 64), None),
        (15, (5, 9), (3, 5)),
        (1, (8, 8), None),
    ],
)
def test_grids(tokens, size, want):
    assert latent_grid(tokens, *size) == want


@pytest.mark.parametrize(
    "path, want",
    [
        ("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "attn1.to_q"),
        ("down_blocks.0.attentions.1.proj_in", "proj_in"),
        ("mid_block.attentions.0.proj_out", "proj_out"),
        ("single_transformer_blocks.12.proj_mlp", "proj_mlp"),
        ("first", "first"),
    ],
)
def test_kinds_of_layers(path, want):
    assert layer_kind(path) == want


def test_the_recorder_says_what_the_gates_said():
    unet = tiny_unet()
    experts = {"a": make_expert(unet), "b": make_expert(unet, seed=1)}
    handle = patch(unet, experts, "local")
    seen = Recorder(handle, 8, 6)
    by_hand = []
    for seed in range(3):
        run_unet(unet, batch=2, seed=seed)
        seen.take(900 - seed)
        by_hand.append({path: said.token[-1] for path, said in handle.gate_maps().items()})
    rows, values = seen.usage("layer")
    assert seen.steps == [900, 899, 898] and values.shape == (len(by_hand[0]), 3, 2)
    for row, path in enumerate(rows):
        for step in range(3):
            torch.testing.assert_close(values[row, step], by_hand[step][path].mean(0))
    assert "attn2.to_k" not in seen.kinds() and "attn1.to_q" in seen.kinds()
    found = seen.maps("proj_in")
    layers = [g for path, g in by_hand[1].items() if path.endswith("proj_in")]
    assert found.shape == (3, 2, 8, 6)
    want = []
    for gate in layers:
        h, w = latent_grid(len(gate), 8, 6)
        want.append(torch.nn.functional.interpolate(gate.mT.reshape(1, 2, h, w), (8, 6))[0])
    torch.testing.assert_close(found[1], torch.stack(want).mean(0))


def test_every_layer_has_a_map_at_every_step_where_asked():
    unet = tiny_unet()
    handle = patch(unet, {"a": make_expert(unet), "b": make_expert(unet, seed=1)}, "local")
    by_layer, by_kind = Recorder(handle, 8, 6, by_layer=True), Recorder(handle, 8, 6)
    said = []
    for seed in range(2):
        run_unet(unet, seed=seed)
        by_layer.take(seed)
        by_kind.take(seed)
        said.append({path: found.token[-1] for path, found in handle.gate_maps().items()})
    seeing = [path for path, gate in said[0].items() if latent_grid(len(gate), 8, 6)]
    assert by_layer.kinds() == seeing and len(seeing) > len(by_kind.kinds())
    for path in seeing:
        for step in range(2):
            gate = said[step][path]
            want = torch.nn.functional.interpolate(
                gate.mT.reshape(1, 2, *latent_grid(len(gate), 8, 6)), (8, 6)
            )[0]
            torch.testing.assert_close(by_layer.maps(path)[step], want)
    kind = by_kind.kinds()[0]
    torch.testing.assert_close(
        by_kind.maps(kind), torch.stack([by_layer.maps(p) for p in seeing if layer_kind(p) == kind]).mean(0)
    )
    drawn = maps_of_layers(by_layer, step=1)
    assert sum(len(axis.images) for axis in drawn.axes) == 2 * len(seeing)


def test_what_was_not_recorded_is_named():
    unet = tiny_unet()
    seen = Recorder(patch(unet, {"a": make_expert(unet)}, "local"), 8, 6)
    with pytest.raises(MoleStateError, match="nothing is recorded"):
        seen.usage()
    run_unet(unet)
    seen.take(1)
    with pytest.raises(MoleValueError, match=r"one of .*proj_in"):
        seen.maps("attn2.to_k")
    with pytest.raises(MoleValueError, match="by one of kind"):
        seen.usage("colour")


def test_spectra_are_those_of_the_dense_matrix_and_ranks_count_its_energy():
    g = torch.Generator().manual_seed(0)
    factor = LowRank(torch.randn(4, 9, generator=g), torch.randn(7, 4, generator=g), 0.3)
    values = bank_spectra(ExpertBank({"a": Expert({"first": factor})}))["a"]["first"]
    dense = torch.linalg.svdvals(0.3 * factor.up.double() @ factor.down.double())[:4]
    torch.testing.assert_close(values.double(), dense, rtol=1e-5, atol=1e-7)
    share = dense.square().cumsum(0) / dense.square().sum()
    for k in range(1, 5):
        assert rank_for(values, float(share[k - 1]) - 1e-4) == k
    assert rank_for(torch.zeros(3), 0.9) == 0


class Page(HTMLParser):
    """Open tags that nothing closed, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_escapes_names_and_holds_its_plots():
    unet = tiny_unet()
    name = "a <script>alert(1)</script>"
    bank = ExpertBank({name: make_expert(unet), "b": make_expert(unet, seed=1)})
    handle = patch(unet, bank, "local")
    seen = Recorder(handle, 8, 6)
    run_unet(unet)
    seen.take(3)
    text = report_page(bank, seen, torch.rand(3, 16, 12))
    page = Page(text)
    assert page.open == [] and "<script" not in text and "&lt;script&gt;" in text
    assert all(uri.startswith("data:image/png;base64,") for uri in page.pictures) and len(page.pictures) == 5
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_the_command_runs_a_pipeline_from_a_folder(tmp_path):
    pipe = load_pipeline(ASSETS)
    pipe.save_pretrained(tmp_path / "pipe")
    files = []
    for i, name in enumerate(("low", "high")):
        files.append(tmp_path / f"{name}.safetensors")
        save_expert(make_expert(pipe.unet, seed=i, scale=0.01), files[-1], "diffusers")
    out = tmp_path / "report.html"
    run = CliRunner().invoke(
        app,
        [
            "report",
            *map(str, files),
            "--model",
            str(tmp_path / "pipe"),
            "--prompt",
            "one two",
            "--sampling-steps",
            "3",
            "--out",
            str(out),
        ],
    )
    assert run.exit_code == 0, run.output
    page = Page(out.read_text())
    # sizes, spectra, usage; ungated experts have one gate of 1 and no map
    assert page.open == [] and len(page.pictures) >= 3 and "low" in out.read_text()
    alone = CliRunner().invoke(app, ["report", str(files[0]), "--out", str(tmp_path / "one.html")])
    assert alone.exit_code == 0 and len(Page((tmp_path / "one.html").read_text()).pictures) == 2


def test_a_schedule_shows_in_the_usage():
    unet, clock = tiny_unet(), Clock(4)
    seen = Recorder(
        patch(unet, {"a": make_expert(unet), "b": make_expert(unet, seed=1)}, switch(clock, every=2)), 8, 6
    )
    for step in range(4):
        clock.set(step)
        run_unet(unet)
        seen.callback(None, step, torch.tensor(1000 - step), {})
    _, values = seen.usage("all")
    assert values[0].tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
