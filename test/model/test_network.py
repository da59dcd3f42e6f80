"""Shapes, key names and sizes of the networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.network import TransUNetConfig, UNetConfig, build_network
from model.network.resnet import ResNet50
from model.network.vit import sincos_positions
from training.recipes import COMPACT, PAPER

# at least 8 channels: see TINY in test_fit
SMALL = TransUNetConfig(
    input_size=64, channels=1, encoder="compact", encoder_widths=(8, 10, 12, 14, 16), vit_width=16,
    vit_depth=2, vit_heads=2, up_widths=(14, 12, 10), softmax_sigma_cells=1.5,
)  # fmt: skip


def gmac(config, side):
    network = build_network(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        heatmaps = network(torch.zeros(1, config.channels, side, side))
    return heatmaps.shape, counter.get_total_flops() / 2e9


@pytest.mark.slow
def test_paper_network_stops_at_the_heatmaps_resolution():
    shape, cost = gmac(PAPER.network, 512)
    assert shape == (1, 3, 64, 64) and PAPER.network.stride == 8
    assert cost == pytest.approx(83, abs=1)  # GMAC; to stride 2 and back it takes 123


@pytest.mark.slow
def test_baseline_and_compact_sizes():
    shape, cost = gmac(UNetConfig(), 512)
    assert shape == (1, 3, 64, 64) and cost == pytest.approx(193, abs=1)
    shape, cost = gmac(COMPACT.network, 256)
    assert shape == (1, 3, 64, 64) and cost < 3


def test_resnet50_has_torchvisions_keys():
    keys = ResNet50(3).state_dict()
    tensors = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer2.3.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.bias": (1024,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
    }
    for name, shape in tensors.items():
        assert tuple(keys[name].shape) == shape
    # torchvision's file has 320 entries, of which fc.weight and fc.bias are the classifier
    assert len(keys) == 318


def test_members_leave_the_view_score_alone():
    config = replace(SMALL, view_channels=4)
    network = build_network(replace(config, members=(SMALL,)), masks=2).eval()
    alone = build_network(config, masks=2).eval()
    alone.load_state_dict({k: network.state_dict()[k] for k in alone.state_dict()})
    image = torch.randn(2, 1, 64, 64)
    (maps, score), (own, own_score) = network(image), alone(image)
    assert torch.equal(score, own_score) and not torch.equal(maps, own)
    torch.testing.assert_close(maps, (own + network.members[0](image)) / 2)


def test_training_returns_raw_values_and_evaluation_heatmaps_and_shares():
    network = build_network(SMALL, masks=2)
    image = torch.randn(2, 1, 64, 64)
    raw = network.train()(image)
    assert raw.heatmaps.shape == (2, 3, 16, 16) and raw.masks.shape == (2, 2, 16, 16)
    output = network.eval()(image)
    assert output.shape == (2, 5, 16, 16)
    heatmaps, shares = output[:, :3], output[:, 3:]
    assert shares.min() >= 0 and shares.max() <= 1
    mass = heatmaps.sum(dim=(2, 3))
    np.testing.assert_allclose(mass.detach(), 2 * np.pi * 1.5**2, rtol=1e-5)
    assert build_network(SMALL).train()(image).masks is None


def test_any_grid_within_one_network_class():
    config = replace(SMALL, up_widths=(10, 8), input_size=96)
    assert config.stride == 8
    assert build_network(config).eval()(torch.zeros(1, 1, 96, 96)).shape == (1, 3, 12, 12)
    unet = UNetConfig(input_size=64, channels=1, widths=(4, 6, 8), stride=4)
    assert build_network(unet).eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 3, 16, 16)


def test_resnet_widths_cannot_be_others():
    with pytest.raises(ValueError, match="expected encoder_widths"):
        build_network(TransUNetConfig(encoder_widths=(1, 2, 3, 4, 5)))


def test_positions_tell_rows_from_columns():
    positions = sincos_positions(3, 5, 16)
    assert positions.shape == (15, 16)
    grid = positions.reshape(3, 5, 16)
    assert torch.equal(grid[0, :, 8:], grid[0, :1, 8:].expand(5, 8))  # same row, same second half
    assert torch.equal(grid[:, 2, :8], grid[:1, 2, :8].expand(3, 8))
    assert len(torch.unique(positions, dim=0)) == 15
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(2, 2, 6)
