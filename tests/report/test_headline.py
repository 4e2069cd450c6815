"""The README's table of trainings."""

import accuracy
from bitswitch.report.headline import LABELS, differences, headline
from bitswitch.report.markdown import difference
from report.trainings import training

OURS = next(iter(LABELS))


def runs(variant, *drops, bits=(8, 2), schedule="decide"):
    """One run for each drop, in the order of seeds; the float network stands at 90."""
    return [
        training(variant, seed, top1=90.0 - drop, drop=drop, bits=bits, schedule=schedule)
        for seed, drop in enumerate(drops)
    ]


def test_rows_are_means_beside_float_in_the_order_of_the_labels():
    (table,) = headline([*runs("paper", 2.0, 1.0, 1.5), *runs(OURS, -1.0, 0.5, -0.25)])
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows == [
        "|  | stores, kB | 8 bits | 2 bits |",
        "| float |  | 90.00 | 90.00 |",
        "| bitswitch | 123 | 90.25 (+0.25 ± 0.75) | 90.25 (+0.25 ± 0.75) |",
        "| the paper's recipe | 123 | 88.50 (-1.50 ± 0.50) | 88.50 (-1.50 ± 0.50) |",
    ]
    assert "mean of seeds 0, 1, 2" in table and "JPEG" in table and "abcdef012345" in table


def test_three_differences_are_sure_beyond_two_and_a_half_standard_deviations():
    """Student's t of two degrees of freedom at 97.5 %, 4.303, over the root of three: 2.484."""
    assert difference([0.151, 0.251, 0.351]) == "**0.25 ± 0.10**" and difference([-0.351, -0.251, -0.151])[:2] == "**"
    assert difference([0.145, 0.245, 0.345]) == "0.24 ± 0.10" and difference([1.0, 1.1]) == difference(
        [1.0, 1.1]
    ).strip("*")


def test_longer_trainings_are_rows_of_their_own():
    known = [*runs(OURS, -1.0, 0.5, -0.25), *runs("paper", 2.0, 1.0, 1.5), *runs("lsq", 2.0, 2.0, 2.0)]
    (table,) = headline([*runs("paper", 1.0, 1.0, 1.0, schedule="long"), *known])
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows[3:5] == ["| the paper's recipe", "| the paper's recipe, 2 epochs"]
    assert "| the paper's recipe, 2 epochs | 123 | 89.00 (-1.00 ± 0.00) | 89.00 (-1.00 ± 0.00) |" in table
    # Not all seeds, or a list that was not decided: no row.
    assert headline([*known, *runs("paper", 1.0, 1.0, schedule="long")]) == headline(known)
    assert headline([*known, *runs("paper", 1.0, 1.0, 1.0, schedule="long", bits=(4, 2))]) == headline(known)
    assert headline([*known, *runs("paper", 1.0, 1.0, 1.0, 1.0, schedule="long")]) == headline(known)


def test_networks_of_one_width_are_one_row_of_the_lists_that_hold_them_all():
    known = [*runs(OURS, 1.0, 1.0, 1.0, bits=(8, 6, 2)), *runs(OURS, 1.0, 1.0, 1.0, bits=(4, 3, 2))]
    both = [*runs("lsq-8-alone", 2.0, 1.0, 1.5, bits=(8,)), *runs("lsq-2-alone", 4.0, 4.0, 4.0, bits=(2,))]
    first, second = headline([*known, *both])
    assert (
        "| LSQ, a network for each width, float weights kept | 247 | 88.50 (-1.50 ± 0.50) |  | 86.00 (-4.00 ± 0.00) |"
        in first
    )
    assert second == headline(known)[1]
    # Not all seeds of one of them, or other seeds: no row.
    assert headline([*known, *both[:-1]]) == headline(known)
    assert headline([*known, *both[:-1], both[-1] | {"seeds": [3]}]) == headline(known)


def test_what_has_no_label_no_test_or_not_all_seeds_is_left_out():
    known = runs(OURS, 1.0, 1.0, 1.0)
    more = [*runs("other", 0.0, 0.0, 0.0), *runs("paper", 0.0, 0.0, 0.0, schedule="screen"), *runs("lsq", 0.0, 0.0)]
    assert headline([*known, *more]) == headline(known) != []
    assert headline(more[:6]) == []


def test_two_seeds_are_too_few():
    assert headline(runs(OURS, 1.0, 1.0)) == []


def test_every_list_of_widths_has_a_table():
    tables = headline([*runs(OURS, 1.0, 1.0, 1.0), *runs(OURS, 1.0, 1.0, 1.0, bits=(4, 3, 2))])
    assert ["8, 2 bits" in table for table in tables] == [True, False]
    assert ["4, 3, 2 bits" in table for table in tables] == [False, True]


def test_a_list_of_widths_without_ours_has_no_table():
    known = [*runs(OURS, 1.0, 1.0, 1.0), *runs("paper", 1.0, 1.0, 1.0)]
    assert headline([*known, *runs("paper", 1.0, 1.0, 1.0, bits=(4, 3, 2))]) == headline(known) != []


def test_differences_are_paired_by_seed_and_bold_where_the_interval_leaves_0_out():
    known = [*runs(OURS, 1.0, 2.0, 3.0), *runs("paper", 3.0, 4.1, 5.0), *runs("lsq", 2.0, 2.0, 2.0)]
    (table,) = differences([*known, *runs("paper", 1.0, 2.5, 4.0, schedule="long")])
    # 2.0, 2.1 and 2.0 are 2.03 ± 0.06, of which the interval is ± 2.48 times 0.06; 1, 0 and -1 are none.
    assert "| bitswitch | the paper's recipe | test | **2.03 ± 0.06** | **2.03 ± 0.06** |" in table
    assert "| bitswitch | LSQ jointly, float weights kept | val | 0.00 ± 1.00 | 0.00 ± 1.00 |" in table
    assert "| bitswitch | the paper's recipe, 2 epochs | test | 0.50 ± 0.50 | 0.50 ± 0.50 |" in table
    assert "JPEG" in table and "abcdef012345" in table and "bitswitch, 2 epochs" not in table
    (longer,) = differences([*known, *runs(OURS, 0.5, 1.5, 2.5, schedule="long")])
    assert "| bitswitch, 2 epochs |" not in longer
    more = [*runs(OURS, 0.5, 1.5, 2.5, schedule="long"), *runs("paper", 1.0, 2.0, 3.0, schedule="long")]
    (longer,) = differences([*known, *more])
    assert "| bitswitch, 2 epochs | the paper's recipe, 2 epochs | test | **0.50 ± 0.00** | **0.50 ± 0.00** |" in longer
    assert longer.count("| bitswitch, 2 epochs |") == 2


def test_a_way_with_every_width_in_every_step_has_a_row_and_is_not_what_was_decided():
    every = next(variant for variant, label in LABELS.items() if "every width" in label)
    known = [*runs(OURS, 1.0, 1.0, 1.0), *runs("paper", 3.0, 3.0, 3.0), *runs("paper", 2.0, 2.0, 2.0, schedule="long")]
    more = [*known, *runs(every, 1.5, 1.5, 1.5)]
    (table,) = headline(more)
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[2:5] == ["| float", "| bitswitch", "| bitswitch, every width in every step"]
    assert [table.splitlines()[2:-2] for table in differences(more)] == [
        table.splitlines()[2:-2] for table in differences(known)
    ]


def test_what_joint_lsq_gains_by_our_training_is_told_too():
    taught = next(variant for variant, label in LABELS.items() if "trained as" in label)
    known = [*runs(OURS, 1.0, 1.0, 1.0), *runs("lsq", 3.0, 3.0, 3.0), *runs(taught, 2.0, 2.0, 2.0)]
    (table,) = differences(known)
    assert f"| {LABELS[taught]} | {LABELS['lsq']} | test | **1.00 ± 0.00** | **1.00 ± 0.00** |" in table


def test_every_label_is_of_a_training_in_the_queue():
    assert {f"decide-{variant}-seed{seed}" for variant in LABELS for seed in range(3)} <= set(accuracy.QUEUE)
