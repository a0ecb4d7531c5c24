"""Which rows go through the network together."""

import random

import torch

from trl_opsd.scoring import cut_by_tokens, cut_into, keep_groups_together


class TestCutByTokens:
    def test_every_row_once_and_no_pass_over_the_budget(self):
        generator = random.Random(0)
        for _ in range(200):
            num_rows = generator.randint(1, 12)
            prompts = [generator.randint(1, 60) for _ in range(num_rows)]
            completions = [generator.randint(1, 60) for _ in range(num_rows)]
            groups = [generator.randint(0, 3) for _ in range(num_rows)]
            budget = generator.randint(1, 400)
            padded = generator.random() < 0.5
            passes = cut_by_tokens(prompts, completions, groups, budget, padded)
            assert sorted(row for rows in passes for row in rows) == list(range(num_rows))
            for rows in passes:
                width = max(prompts[r] for r in rows) + max(completions[r] for r in rows)
                num_tokens = len(rows) * width if padded else sum(prompts[r] + completions[r] for r in rows)
                assert len(rows) == 1 or num_tokens <= budget
            number = generator.randint(1, num_rows)
            further = cut_into(passes, number)
            assert len(further) == max(number, len(passes))
            assert sorted(row for rows in further for row in rows) == list(range(num_rows))

    def test_long_row_is_alone_and_short_ones_stay_together(self):
        rows = [10, 50, 12, 11], [5, 9, 5, 5], [0, 1, 2, 3]
        assert cut_by_tokens(*rows, 92, padded=False) == [[1, 2, 3], [0]]
        assert cut_by_tokens(*rows, 107, padded=False) == [[1, 2, 3, 0]]
        assert cut_by_tokens(*rows, 107) == [[1], [2, 3, 0]]

    def test_rows_of_one_prompt_stay_together(self):
        passes = cut_by_tokens([50] * 6, [40, 30, 30, 5, 10, 9], [0, 1, 0, 1, 0, 1], 280)
        assert [sorted(rows) for rows in passes] == [[0, 2, 4], [1, 3, 5]]


def test_rows_are_reordered_within_a_window_only():
    batches = [
        {"row": torch.tensor([2 * i, 2 * i + 1]), "group": torch.tensor(group), "scalar": torch.tensor(7)}
        for i, group in enumerate([[4, 1], [1, 4], [3, 1], [4, 3]])
    ]
    regrouped = keep_groups_together(batches, 2, "group")
    assert [batch["group"].tolist() for batch in regrouped] == [[4, 4], [1, 1], [3, 3], [1, 4]]
    assert [batch["row"].tolist() for batch in regrouped] == [[0, 3], [1, 2], [4, 7], [5, 6]]
    assert all(batch["scalar"] == 7 for batch in regrouped)
