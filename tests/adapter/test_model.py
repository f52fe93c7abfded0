"""The adapter as a function: what goes in, what comes out, and what must not matter."""

import math

import pytest
import torch
from torch.nn import functional as F

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.types import Features
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError

CONFIG = AdapterConfig(
    hidden_dim=16,
    num_heads=2,
    dim_feedforward=32,
    num_queries_matching=3,
    num_queries_rec=4,
    contrastive_dim=6,
    num_token_classes=9,
)
POOLED, TEXT = 10, 12


def build(config: AdapterConfig = CONFIG, **channels: int) -> DiscriminativeAdapter:
    torch.manual_seed(0)
    return DiscriminativeAdapter(config, channels or {"up1": 5}, POOLED, TEXT).eval()


def features(batch: int = 3, seed: int = 0, **sizes: tuple[int, int, int]) -> Features:
    generator = torch.Generator().manual_seed(seed)
    maps = {tap: torch.randn(batch, *size, generator=generator) for tap, size in (sizes or {"up1": (5, 4, 6)}).items()}
    return Features(maps=maps, timesteps=torch.tensor([10, 500, 900])[:batch])


def test_shapes_and_ranges() -> None:
    tokens = torch.randn(3, 7, TEXT)
    output = build()(features(), tokens, torch.ones(3, 7, dtype=torch.bool))
    assert output.match_embeds.shape == (3, 3, POOLED)
    assert output.logits.shape == (3, 4, 10)
    assert output.boxes.shape == (3, 4, 4) and output.boxes.min() >= 0 and output.boxes.max() <= 1
    assert output.token_align is not None and output.token_align.shape == (3, 7, 6)
    torch.testing.assert_close(output.token_align.norm(dim=-1), torch.ones(3, 7))
    torch.testing.assert_close(output.query_align.norm(dim=-1), torch.ones(3, 4))
    assert build()(features()).token_align is None


def test_a_larger_map_is_read_as_its_averages() -> None:
    whole = build(up1=5, mid=3)
    small = build(CONFIG.model_copy(update={"max_map_size": 4}), up1=5, mid=3)
    given = features(up1=(5, 8, 6), mid=(3, 4, 2))
    means = given.maps["up1"].reshape(3, 5, 4, 2, 6).mean(dim=3)  # 8 rows -> 4; 6 columns -> 4 of 2, sharing columns
    columns = torch.stack([means[..., 0:2], means[..., 1:3], means[..., 3:5], means[..., 4:6]], dim=3).mean(dim=-1)
    averaged = Features({"up1": columns, "mid": given.maps["mid"]}, given.timesteps)
    torch.testing.assert_close(small(given).match_embeds, whole(averaged).match_embeds)
    assert not torch.allclose(small(given).match_embeds, whole(given).match_embeds)


def test_eval_is_deterministic_and_train_is_not() -> None:
    adapter = build()
    torch.testing.assert_close(adapter(features()).match_embeds, adapter(features()).match_embeds, rtol=0, atol=0)
    adapter.train()
    assert not torch.equal(adapter(features()).match_embeds, adapter(features()).match_embeds)


def test_permuting_examples_permutes_outputs() -> None:
    adapter, given, order = build(), features(), torch.tensor([2, 0, 1])
    shuffled = Features({tap: one[order] for tap, one in given.maps.items()}, given.timesteps[order])
    straight, permuted = adapter(given), adapter(shuffled)
    for name in ("match_embeds", "logits", "boxes", "query_align"):
        torch.testing.assert_close(getattr(permuted, name), getattr(straight, name)[order], atol=1e-5, rtol=1e-5)


def test_image_timestep_and_place_all_matter() -> None:
    adapter, given = build(), features()
    reference = adapter(given).match_embeds
    later = Features(given.maps, given.timesteps + 50)
    mirrored = Features({"up1": given.maps["up1"].flip(-1)}, given.timesteps)
    for changed in (features(seed=1), later, mirrored):
        assert (adapter(changed).match_embeds - reference).abs().max() > 1e-4


def test_position_and_time_do_not_reach_the_values() -> None:
    """A map that is the same everywhere gives every place the same value, so attention's weights cannot matter."""
    config = CONFIG.model_copy(update={"normalize_features": False})
    adapter = build(config)
    flat = {"up1": torch.randn(1, 5, 1, 1).expand(1, 5, 4, 6)}
    early, late = (adapter(Features(flat, torch.tensor([t]))).match_embeds for t in (10, 900))
    torch.testing.assert_close(early, late, atol=1e-5, rtol=1e-5)


def test_positions_may_reach_the_values() -> None:
    """One place only: attention has nothing to choose, so place and time can come through the values alone."""
    adapter = build(CONFIG.model_copy(update={"position_values": True}))
    one = torch.ones(1, 5, 1, 1)
    early, late = (adapter(Features({"up1": one}, torch.tensor([t]))).boxes for t in (10, 900))
    assert not torch.allclose(early, late)
    wide, high = (
        adapter(Features({"up1": one.expand(1, 5, *size)}, torch.tensor([10]))).boxes for size in ((1, 2), (2, 1))
    )
    assert not torch.allclose(wide, high)


@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_makes_the_scale_of_a_map_irrelevant(normalize: bool) -> None:
    adapter, given = build(CONFIG.model_copy(update={"normalize_features": normalize})), features()
    louder = Features({"up1": 100 * given.maps["up1"]}, given.timesteps)
    difference = (adapter(louder).match_embeds - adapter(given).match_embeds).abs().max()
    assert (difference < 1e-3) == normalize


def test_several_taps_equal_one_projection_of_their_concatenation() -> None:
    config = CONFIG.model_copy(update={"normalize_features": False})
    joined, single = build(config, mid=3, up1=2), build(config, up1=5)
    parts = [joined.projections["mid"], joined.projections["up1"]]
    single.load_state_dict(
        {key: value for key, value in joined.state_dict().items() if not key.startswith("projections")}
        | {
            "projections.up1.weight": torch.cat([part.weight for part in parts], dim=1),
            "projections.up1.bias": parts[0].bias,
        }
    )
    given = features(mid=(3, 4, 6), up1=(2, 4, 6))
    concatenated = Features({"up1": torch.cat(list(given.maps.values()), dim=1)}, given.timesteps)
    torch.testing.assert_close(joined(given).match_embeds, single(concatenated).match_embeds, atol=1e-5, rtol=1e-5)


def test_a_small_map_is_brought_to_the_largest() -> None:
    adapter = build(CONFIG.model_copy(update={"normalize_features": False}), mid=3, up1=2)
    given = features(mid=(3, 2, 3), up1=(2, 4, 6))
    enlarged = F.interpolate(given.maps["mid"], size=(4, 6), mode="bilinear", align_corners=False)
    expected = adapter(Features({"mid": enlarged, "up1": given.maps["up1"]}, given.timesteps))
    torch.testing.assert_close(adapter(given).boxes, expected.boxes, atol=1e-5, rtol=1e-5)


def test_inner_blocks_are_taps_too_and_odd_maps_fit() -> None:
    tap = "up_blocks.1.resnets.0"
    adapter = build(CONFIG, **{tap: 5})
    assert adapter(features(**{tap: (5, 3, 7)})).boxes.shape == (3, 4, 4)


def test_wrong_maps_and_sizes_are_named() -> None:
    with pytest.raises(InputError, match="`up1` with 5 channels, but got no such map"):
        build()(features(mid=(5, 4, 4)))
    with pytest.raises(InputError, match="`up1` with 5 channels, but got 6 channels"):
        build()(features(up1=(6, 4, 4)))
    with pytest.raises(InputError, match="hidden_dim 18"):
        build(CONFIG.model_copy(update={"hidden_dim": 18}))
    with pytest.raises(InputError, match="at least one tap"):
        DiscriminativeAdapter(CONFIG, {}, POOLED, TEXT)


def test_logit_scale_starts_at_one_over_007_and_stops_at_100() -> None:
    adapter = build()
    assert adapter(features()).logit_scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        adapter.logit_scale.fill_(math.log(1000.0))
    assert adapter(features()).logit_scale.item() == pytest.approx(100.0)


def test_every_parameter_gets_a_gradient_and_so_does_the_map() -> None:
    adapter, given = build(), features()
    given.maps["up1"].requires_grad_(True)
    output = adapter(given, torch.randn(3, 7, TEXT))
    total = sum(getattr(output, name).square().sum() for name in ("match_embeds", "logits", "boxes", "logit_scale"))
    weights = torch.randn(6)  # a plain sum of squares of unit vectors is constant
    (total + (output.query_align * weights).sum() + (output.token_align * weights).sum()).backward()
    assert [name for name, parameter in adapter.named_parameters() if parameter.grad is None] == []
    assert given.maps["up1"].grad.abs().max() > 0


def test_half_precision_maps_are_taken() -> None:
    given = features()
    half = Features({"up1": given.maps["up1"].half()}, given.timesteps)
    torch.testing.assert_close(build()(half).boxes, build()(given).boxes, atol=1e-3, rtol=1e-3)


def test_match_score_is_the_best_querys_cosine() -> None:
    embeds = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[-3.0, 0.0], [-1.0, -1.0]]])
    pooled = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    output = AdapterOutput(embeds, *[torch.empty(0)] * 3, None, torch.ones([]))
    assert match_score(output, pooled).tolist() == pytest.approx([0.8, -(0.5**0.5)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert match_score(output, pooled).tolist() == pytest.approx([0.8, -(0.5**0.5)], abs=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_matching_alone_says_what_the_whole_says(layers) -> None:
    adapter = build(CONFIG.model_copy(update={"dec_layers": layers}))
    torch.testing.assert_close(adapter.match_embeds(features()), adapter(features()).match_embeds)
    output = adapter(features())
    pooled = torch.randn(3, POOLED, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(match_score(adapter.match_embeds(features()), pooled), match_score(output, pooled))
    with torch.no_grad():  # the grounding queries are attended to all the same
        adapter.queries.weight[CONFIG.num_queries_matching :] += 1.0
    torch.testing.assert_close(adapter.match_embeds(features()), adapter(features()).match_embeds)
