"""A whole model of random weights: what it says means nothing, but the same in every way of asking."""

import pytest
import torch

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.config import AdapterConfig
from dpt_t2i.sampling.model import T2IModel
from tests.tiny import tiny_pipeline

SIZES = AdapterConfig(
    hidden_dim=16,
    num_heads=2,
    dim_feedforward=32,
    num_queries_matching=3,
    num_queries_rec=12,
    contrastive_dim=8,
    num_token_classes=16,
)


@pytest.fixture(scope="session")
def model() -> T2IModel:
    backbone = StableDiffusionBackbone(tiny_pipeline(), "tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = DiscriminativeAdapter(
            SIZES, {"up1": backbone.taps["up1"].channels}, backbone.pooled_dim, backbone.text_dim
        )
    return T2IModel(backbone, adapter)
