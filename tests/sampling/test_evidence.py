import torch

from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.sampling.evidence import phrase_boxes

PROMPT = "a red circle left of a star"
OFFSETS = [(0, 0), (0, 1), (2, 5), (6, 12), (13, 17), (18, 20), (21, 22), (23, 27), (0, 0), (0, 0)]


def output(*queries: tuple[dict[int, float], list[float]]) -> AdapterOutput:
    """Queries given as ({token position: probability}, cxcywh box); what is left of 1 is `no object` (index 12)."""
    probabilities = torch.full((1, len(queries), 13), 1e-9)
    for row, (words, _) in enumerate(queries):
        for position, share in words.items():
            probabilities[0, row, position] = share
        probabilities[0, row, 12] = max(1 - sum(words.values()), 1e-9)
    return AdapterOutput(
        match_embeds=torch.zeros(1, 1, 1),
        logits=probabilities.log(),
        boxes=torch.tensor([[box for _, box in queries]]),
        query_align=torch.zeros(1, len(queries), 1),
        token_align=None,
        logit_scale=torch.tensor(1.0),
    )


def find(*queries):
    return phrase_boxes(output(*queries), OFFSETS, PROMPT, width=40, height=20)


def test_a_query_names_its_words_and_its_box_in_pixels():
    (found,) = find(({2: 0.4, 3: 0.4}, [0.5, 0.5, 0.5, 0.5]))
    assert (found.phrase, found.span) == ("red circle", (2, 12))
    assert found.box == (10.0, 5.0, 30.0, 15.0)
    assert abs(found.confidence - 0.8) < 1e-4


def test_best_first_doubtful_ones_and_doubles_dropped():
    found = find(
        ({7: 0.6}, [0.25, 0.5, 0.5, 1.0]),
        ({3: 0.9}, [0.75, 0.5, 0.5, 1.0]),
        ({7: 0.55}, [0.26, 0.5, 0.5, 1.0]),  # the same star again
        ({7: 0.7}, [0.75, 0.5, 0.5, 1.0]),  # another star, elsewhere
        ({3: 0.3}, [0.1, 0.1, 0.1, 0.1]),  # more likely nothing than something
    )
    assert [(one.phrase, round(one.confidence, 2)) for one in found] == [("circle", 0.9), ("star", 0.7), ("star", 0.6)]


def test_boxes_end_at_the_image():
    (found,) = find(({7: 0.9}, [0.0, 0.5, 0.5, 2.0]))
    assert found.box == (0.0, 0.0, 10.0, 20.0)


def test_a_run_of_words_stops_at_the_first_unlikely_one():
    (found,) = find(({2: 0.3, 3: 0.4, 5: 0.25}, [0.5, 0.5, 0.5, 0.5]))
    assert found.phrase == "red circle"


def test_special_tokens_name_nothing():
    assert find(({0: 0.9}, [0.5, 0.5, 0.5, 0.5]), ({11: 0.9}, [0.5, 0.5, 0.5, 0.5])) == ()
