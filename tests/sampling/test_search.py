import pytest

from dpt_t2i.config import SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import generate, jobs_of
from dpt_t2i.sampling.scoring import Judge, MatchScorer
from dpt_t2i.sampling.search import best_of, best_seed, candidate_seeds
from tests.tiny import tiny_adapter, tiny_backbone


def test_the_highest_score_wins_and_a_tie_goes_to_the_lowest_seed():
    assert best_seed({5: 0.1, 2: 0.3, 9: 0.2}) == 2
    assert best_seed({9: 0.3, 5: 0.3, 7: 0.3, 1: 0.2}) == 5
    with pytest.raises(InputError, match="seed 5 is NaN"):
        best_seed({2: 0.3, 5: float("nan")})


def test_candidates_start_with_the_seed_itself_and_never_meet():
    assert candidate_seeds(3, 1) == [3]
    pools = [set(candidate_seeds(seed, 8)) for seed in range(100)]
    assert len(set().union(*pools)) == 800


def test_the_search_keeps_what_plain_generation_would_rank_first():
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    judge = Judge(scorer, 250, 1, 0)
    jobs = jobs_of(["a red circle", "two blue stars"], [0])
    settings = SampleConfig(steps=2, batch_size=4)
    results = list(best_of(backbone, jobs, 3, judge, settings))
    for job, result in zip(jobs, results, strict=True):
        seeds = candidate_seeds(0, 3)
        alone = {
            made.job.seed: made for made in generate(backbone, jobs_of([job.prompt], seeds), settings, judge=judge)
        }
        assert list(result.scores) == seeds
        assert result.scores == pytest.approx({seed: made.score for seed, made in alone.items()}, abs=1e-5)
        winner = max(alone.values(), key=lambda made: made.score)
        assert result.best.job.noise_seed == winner.job.seed
        assert (result.best.job.seed, result.best.job.prompt) == (0, job.prompt)


def test_own_noise_is_a_function_of_prompt_and_seed():
    prompts, seeds = ["a red circle", "two blue stars"], [0, 1]
    shared, own = jobs_of(prompts, seeds), jobs_of(prompts, seeds, own_noise=True)
    assert [job.noise_seed for job in shared] == [0, 1, 0, 1]
    assert [(job.prompt, job.seed) for job in own] == [(job.prompt, job.seed) for job in shared]
    turned = jobs_of(prompts[::-1], seeds, own_noise=True)
    assert {(job.prompt, job.seed): job.noise_seed for job in own} == {
        (job.prompt, job.seed): job.noise_seed for job in turned
    }
    candidates = [seed for job in own for seed in candidate_seeds(job.noise_seed, 8)]
    assert len(set(candidates)) == 32 and max(candidates) < 2**63
