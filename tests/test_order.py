"""The order of samples in a source, and the mixture of sources: pure functions of settings and global sample index."""

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from smolds_dist.data.mixture import Mixture, exact_shares, truncate_schedule
from smolds_dist.data.order import FIRST_WINDOW, ROUNDS, Epoch, SampleOrder, TokenSpan, permute_index
from smolds_dist.data.packing import best_fit
from smolds_dist.data.shards import DOCUMENT, SHARD_BYTES, group_files, group_into_shards
from smolds_dist.data.source import File
from smolds_dist.data.staged_order import StagedOrder
from smolds_dist.settings import Data, RunConfig, Source, Train
from smolds_dist.stages import Stages, StageSpan


def order_of(starts: list[int], tokens: int, seq_len: int, seed: int, window_tokens: int) -> SampleOrder:
    """Return an order of shards with one span each, numbered within the source."""
    bounds = [*starts, tokens]

    def spans_in(following: np.ndarray, _wait: bool) -> list[TokenSpan]:
        shard = int(following[0])
        return [TokenSpan(0, bounds[shard], bounds[shard + 1] - bounds[shard])]

    return SampleOrder(len(starts), spans_in, seq_len, seed, window_tokens)


def keys_of(number: int) -> np.ndarray:
    return np.arange(number, number + ROUNDS, dtype=np.uint64)[None] * np.uint64(0x9E3779B97F4A7C15)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permutation_hits_every_index_once(size):
    places = np.arange(size)
    sizes = np.full(size, size)
    one, other = permute_index(places, sizes, keys_of(1)), permute_index(places, sizes, keys_of(2))
    assert sorted(one.tolist()) == sorted(other.tolist()) == list(range(size))
    assert size < 16 or (one != other).any()


def test_permutation_is_uniform():
    """Each of eight items gets each of eight places equally often, and every pair keeps its order half the time."""
    rounds = 2000
    places = np.stack([permute_index(np.arange(8), np.full(8, 8), keys_of(key)) for key in range(rounds)])
    counts = np.stack([np.bincount(places[:, thing], minlength=8) for thing in range(8)])
    assert ((counts - rounds / 8) ** 2 / (rounds / 8)).sum() < 100  # chi-square, 49 degrees of freedom: above 1 in 10^4
    assert abs((places[:, 0] < places[:, 1]).mean() - 0.5) < 0.05


def test_order_stays_what_it_was():
    """Recorded with version 3 of the order: runs resume in it on any machine, with any version of any library."""
    order = order_of([0, 75, 100], 330, seq_len=10, seed=7, window_tokens=100)
    epochs, places = order.locate(np.arange(40))
    assert epochs.tolist() == [0] * 33 + [1] * 7
    assert places.tolist() == RECORDED
    assert order.spans(np.array([0, 3])) == RECORDED_SPANS
    large = order_of([0], 10**13, seq_len=1000, seed=2**40, window_tokens=2**28)
    assert (1000 * large.locate(np.array([0, 1, 5 * 10**9, 10**10 - 1, 10**10]))[1]).tolist() == RECORDED_LARGE
    assert group_into_shards([2**19] * 10) == [0, 2, 3, 0, 4, 1, 4, 2, 1, 3]
    source = Source("jsonl:*")
    files = [File(f"{number}.jsonl", size, "") for number, size in enumerate([2**19] * 4 + [2**25 + 1, 2**21])]
    shards = group_files(source, files)
    assert [[(part.file, part.number, part.of) for part in shard] for shard in shards] == RECORDED_SHARDS


RECORDED = [
    9, 2, 1, 7, 4, 3, 5, 8, 6, 0, 27, 22, 10, 16, 25, 18, 28, 23, 15, 13, 17, 19, 24, 11,
    30, 32, 12, 31, 14, 26, 20, 29, 21, 9, 7, 8, 3, 6, 1, 2,
]  # fmt: skip
RECORDED_SPANS = [[(0, 90, 10)], [(0, 70, 5), (0, 75, 5)]]
RECORDED_LARGE = [9037558459000, 8193538121000, 5797450439000, 998896847000, 2986002147000]
RECORDED_SHARDS = [[(0, 0, 1), (3, 0, 1)], [(4, 1, 3)], [(4, 2, 3)], [(5, 0, 1)], [(1, 0, 1), (2, 0, 1)], [(4, 0, 3)]]


def test_small_files_share_a_shard_but_not_with_their_neighbors():
    sizes = [2**14] * 1000 + [2**21, 5]
    shards = group_into_shards(sizes)
    assert group_into_shards(sizes) == shards and set(shards) == set(range(max(shards) + 1))
    totals = np.bincount(shards, weights=sizes)
    assert (np.delete(totals, shards[1000]) <= SHARD_BYTES).all() and len(totals) < 70
    assert shards.count(shards[1000]) == 1  # the large file
    members = [np.flatnonzero(np.array(shards) == shard) for shard in range(max(shards))]
    assert all(np.ptp(files) > 300 for files in members if len(files) > 20)

    # the content of a shard stays together in every epoch
    def spans_in(following, _):
        return [TokenSpan(0, 10 * n, 10) for n in np.flatnonzero(np.array(shards) == following[0]).tolist()]

    order = SampleOrder(max(shards) + 1, spans_in, seq_len=10, seed=0, window_tokens=2**20)
    for epoch in range(2):
        stream = [shards[start // 10] for start in sorted_by_stream(order, epoch)]
        assert len([1 for one, other in pairwise(stream) if one != other]) == max(shards)


def sorted_by_stream(order: SampleOrder, epoch: int) -> list[int]:
    """Return the indices of an epoch's samples in its token stream, in stream order."""
    positions = np.arange(order.num_samples) + epoch * order.num_samples
    _, starts = order.locate(positions)
    return [order.spans(positions[at : at + 1])[0][0].start for at in np.argsort(starts)]


def test_every_epoch_has_each_token_once_in_a_new_order():
    order = order_of([0, 700, 710, 2000], 3000, seq_len=10, seed=1, window_tokens=2**20)
    epochs = []
    for epoch in range(3):
        spans = order.spans(np.arange(300) + 300 * epoch)
        assert all(sum(span.length for span in sample) == 10 for sample in spans)
        tokens = [token for sample in spans for _, start, length in sample for token in range(start, start + length)]
        assert sorted(tokens) == list(range(3000))
        epochs.append(tokens)
    assert epochs[0] != epochs[1] != epochs[2]
    other = order_of([0, 700, 710, 2000], 3000, seq_len=10, seed=2, window_tokens=2**20)
    assert other.spans(np.arange(300)) != order.spans(np.arange(300))


def test_sample_continues_in_the_next_shard():
    order = order_of([0, 5, 11], 30, seq_len=10, seed=0, window_tokens=100)
    shards = {0: range(0, 5), 5: range(5, 11), 11: range(11, 30)}
    for sample in order.spans(np.arange(3)):
        for before, after in pairwise(sample):
            end_of = next(shard for shard in shards.values() if before.start in shard)
            assert before.start + before.length == end_of.stop and after.start in shards


def test_windows_double_in_the_first_epoch_and_are_full_later():
    tokens, window = 40 * FIRST_WINDOW, 8 * FIRST_WINDOW
    shards = list(range(0, tokens, FIRST_WINDOW // 4))
    order = order_of(shards, tokens, seq_len=1024, seed=0, window_tokens=window)
    samples = FIRST_WINDOW // 1024
    for epoch, ends in ((0, [1, 3, 7, 15, 23, 31, 39, 40]), (1, [8, 16, 24, 32, 40])):
        _, places = order.locate(np.arange(40 * samples) + epoch * 40 * samples)
        for begin, end in pairwise([0, *ends]):
            inside = places[begin * samples : end * samples]
            assert inside.min() == begin * samples and inside.max() == end * samples - 1
            assert len(set(inside.tolist())) == len(inside)
    # samples are shuffled within a window
    assert abs(np.corrcoef(np.arange(samples), order.locate(np.arange(samples))[1])[0, 1]) < 0.1


def test_memory_does_not_depend_on_number_of_samples():
    samples, seq_len = 10**10, 1024
    files = list(range(0, samples * seq_len, 2**30))
    chance = np.random.RandomState(0)
    places = np.unique(np.concatenate(([0, samples - 1], chance.randint(0, samples, 200_000))))
    tracemalloc.start()
    order = order_of(files, samples * seq_len, seq_len, seed=3, window_tokens=2**28)
    order.spans(np.array([0, samples // 2, samples - 1]))
    assert tracemalloc.get_traced_memory()[1] < 50 * 10**6
    tracemalloc.stop()
    assert order.num_samples == samples
    _, found = order.locate(places)
    assert len(np.unique(found)) == len(places) > 199_000
    assert found.min() >= 0 and found.max() < samples


def stages_of(parts: list[tuple[int, dict[str, float], int]]) -> Stages:
    """Stages of one sequence per step: each one's last step, weights and sequence length."""
    spans, first, tokens = [], 0, 0
    for number, (end, weights, seq_len) in enumerate(parts, 1):
        config = RunConfig(data=Data(seq_len=seq_len), train=Train(global_batch=1))
        spans.append(StageSpan(number, first, end, first, tokens, weights, config))
        first, tokens = end, tokens + (end - first) * seq_len
    return Stages(spans)


def random_stages(chance: random.Random) -> tuple[list[str], list[tuple[int, dict[str, float]]]]:
    names = [f"s{number}" for number in range(chance.randint(1, 6))]
    stages, end = [], 0
    for _ in range(chance.randint(1, 4)):
        end += chance.randint(1, 400)
        digits = chance.randint(1, 3)
        weights = {name: round(chance.choice([0, chance.random(), 3 * chance.random()]), digits) for name in names}
        stages.append((end, weights if sum(weights.values()) else {names[0]: 1.0}))
    return names, stages


@pytest.mark.parametrize("seed", range(40))
def test_every_prefix_has_the_shares_to_within_one_sequence(seed):
    names, stages = random_stages(random.Random(seed))
    mixture = Mixture(names, stages_of([(*stage, 10) for stage in stages]))
    length = stages[-1][0] + 300
    source, number = mixture.locate(np.arange(length))
    due, counts = [Fraction(0)] * len(names), [0] * len(names)
    for index in range(length):
        at = next((n for n, (end, _) in enumerate(stages) if index < end), len(stages) - 1)
        assert number[index] == counts[source[index]]
        counts[source[index]] += 1
        for place, share in enumerate(exact_shares({name: stages[at][1].get(name, 0) for name in names}).values()):
            due[place] += share
            assert abs(due[place] - counts[place]) < 1
        if index % 50 == 0:
            assert mixture.totals(index + 1).tolist() == counts
    # single lookups in any order give the same result
    some = np.random.RandomState(0).permutation(length)[:100]
    assert (mixture.locate(some)[0] == source[some]).all() and (mixture.locate(some)[1] == number[some]).all()


def test_shares_are_exact_as_written_or_to_a_hundred_thousandth():
    assert exact_shares({"web": 0.7, "code": 0.3}) == {"web": Fraction(7, 10), "code": Fraction(3, 10)}
    assert exact_shares({"a": 2, "b": 1}) == {"a": Fraction(2, 3), "b": Fraction(1, 3)}
    fine = exact_shares({"a": 0.1234567, "b": 0.7654321, "c": 0.1111112})
    assert sum(fine.values()) == 1 and abs(fine["a"] - Fraction(1234567, 10**7)) <= Fraction(1, 10**5)


def test_far_samples_are_located_in_constant_time():
    mixture = Mixture(["a", "b"], stages_of([(10**10, {"a": 0.7, "b": 0.3}, 10), (2 * 10**10, {"a": 1, "b": 3}, 10)]))
    assert mixture.totals(10**10).tolist() == [7 * 10**9, 3 * 10**9]
    assert mixture.totals(2 * 10**10).tolist() == [7 * 10**9 + 25 * 10**8, 3 * 10**9 + 75 * 10**8]
    source, number = mixture.locate(np.array([10**10 - 1, 2 * 10**10 - 1]))
    totals = [mixture.totals(10**10), mixture.totals(2 * 10**10)]
    assert [int(total[s]) for total, s in zip(totals, source, strict=True)] == (number + 1).tolist()


def test_schedule_joins_equal_stages():
    parts = [(80, {"a": 1, "b": 1}, 8), (100, {"a": 2, "b": 2}, 8), (200, {"b": 1}, 8), (300, {"b": 1}, 16)]
    mixture, half = Mixture(["a", "b"], stages_of(parts)), {"a": 0.5, "b": 0.5}
    assert mixture.schedule() == [(100, 100, half, 8), (200, 200, {"b": 1.0}, 8), (300, 300, {"b": 1.0}, 16)]
    saved = [list(part) for part in mixture.schedule()]  # as in a manifest
    assert truncate_schedule(saved, 90, 90) == [(90, 90, half, 8)]
    assert truncate_schedule(saved, 150, 150) == [(100, 100, half, 8), (150, 150, {"b": 1.0}, 8)]
    assert truncate_schedule(saved, 100, 100) == [(100, 100, half, 8)]


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_has_the_shares_in_tokens_where_lengths_change(seed):
    chance = random.Random(seed)
    names, stages = random_stages(chance)
    mixture = Mixture(names, stages_of([(*stage, chance.choice([8, 16, 24])) for stage in stages]))
    due, counts = [Fraction(0)] * len(names), [0] * len(names)
    for stage in mixture.stages:
        source, _ = mixture.locate(np.arange(stage.first, stage.end))
        for index, taken in enumerate(source.tolist(), stage.first + 1):
            counts[taken] += stage.seq_len
            due = [old + share * stage.seq_len for old, share in zip(due, stage.shares.values(), strict=True)]
            assert all(abs(d - c) < 24 + stage.seq_len for d, c in zip(due, counts, strict=True))
            if index % 50 == 0 or index == stage.end:
                assert mixture.tokens(index).tolist() == counts


# Packing.


def table_of(lengths: list[int]) -> np.ndarray:
    table = np.zeros(len(lengths), DOCUMENT)
    table["start"] = np.cumsum([0, *lengths[:-1]])
    return table


def packed_order(shards: list[list[int]], seq_len: int, window: int = 2**20) -> SampleOrder:
    """Return an order of documents of these lengths, by shard."""
    spans = lambda following, _: [TokenSpan(int(following[0]), 0, sum(shards[int(following[0])]))]  # noqa: E731
    pack = partial(best_fit, table=lambda shard: table_of(shards[shard]), seq_len=seq_len)
    return SampleOrder(len(shards), spans, seq_len, 0, window, pack)


def test_best_fit_takes_the_fullest_sample_that_has_room():
    lengths = [2, 7, 5, 3, 21, 1]
    samples = best_fit([TokenSpan(0, 0, sum(lengths))], lambda _: table_of(lengths), 10)
    assert [[(span.start, span.length) for span in sample] for sample in samples] == [
        [(17, 10)], [(27, 10)], [(2, 7), (14, 3)], [(9, 5), (0, 2), (37, 1), (38, 1)],
    ]  # fmt: skip


@pytest.mark.parametrize("window", [300, 2**20])
def test_packed_samples_hold_every_token_once_and_split_only_long_documents(window):
    chance = np.random.RandomState(0)
    shards = [chance.randint(1, 90, chance.randint(5, 60)).tolist() for _ in range(12)]
    order = packed_order(shards, 64, window)
    total = order.num_samples
    seen = []
    for epoch in range(3):
        first = 0 if epoch == 0 else sum(len(one) for one in seen)
        samples, number = [], first
        while sum(span.length for sample in samples for span in sample) < sum(map(sum, shards)):
            samples += order.spans(np.array([number]))
            number += 1
        tokens = Counter(
            (span.shard, token)
            for sample in samples for span in sample for token in range(span.start, span.start + span.length)
        )  # fmt: skip
        assert set(tokens.values()) == {1} and len(tokens) == sum(map(sum, shards))
        assert all(sum(span.length for span in sample) <= 64 for sample in samples)
        spans = {(span.shard, span.start, span.length) for sample in samples for span in sample}
        for shard, lengths in enumerate(shards):
            starts = np.cumsum([0, *lengths[:-1]]).tolist()
            whole = {(shard, start, length) for start, length in zip(starts, lengths, strict=True) if length <= 64}
            assert whole <= spans
        seen.append(samples)
    assert len(seen[0]) == total and seen[0] != seen[1] != seen[2]
    again = packed_order(shards, 64, window)
    last = sum(map(len, seen)) - 1
    assert again.spans(np.array([last, 0, total])) == [seen[2][-1], seen[0][0], seen[1][0]]


# Sequence lengths that change.


def staged(
    documents: list[list[int]], lengths: list[tuple[int, int]], packed: bool, window: int = 60, seed: int = 0
) -> tuple[StagedOrder, Callable[[list[TokenSpan]], list[tuple[int, int]]]]:
    """An order over shards with documents of these lengths; and a function to a sample's tokens (shard, place)."""
    tables = []
    for shard in documents:
        table = np.zeros(len(shard), dtype=[("start", "<u8")])
        table["start"] = np.cumsum([0, *shard[:-1]])
        tables.append(table)

    def spans_in(shards: np.ndarray, wait: bool) -> list[TokenSpan]:
        return [TokenSpan(int(shards[0]), 0, sum(documents[shards[0]]))]

    def make(seq_len: int, rest: tuple[int, Epoch] | None = None) -> SampleOrder:
        pack = partial(best_fit, table=lambda shard: tables[shard], seq_len=seq_len) if packed else None
        return SampleOrder(len(documents), spans_in, seq_len, seed, window, pack, rest)

    def places(spans: list[TokenSpan]) -> list[tuple[int, int]]:
        return [(shard, place) for shard, start, length in spans for place in range(start, start + length)]

    return StagedOrder(lengths, make), places


def test_the_size_of_an_epoch_is_known_after_a_change_of_length_within_it():
    order, _ = staged([[10, 20]] * 10, [(0, 10), (3, 20)], packed=False)
    order.spans(np.arange(3))
    assert not order.complete
    order.spans(np.arange(3, 6))
    assert order.complete and order.tokens_per_epoch == 300


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_no_token_is_lost_or_comes_twice_where_the_length_changes(seed, packed):
    """Until the end of the first epoch, all tokens but the few that fill no sequence come once, for changes anywhere."""
    chance = random.Random(seed)
    documents = [[chance.randint(1, 40) for _ in range(chance.randint(1, 9))] for _ in range(chance.randint(1, 12))]
    total = sum(map(sum, documents))
    lengths, first = [], 0
    for _ in range(4):
        lengths.append((first, chance.choice([4, 8, 16])))
        first += chance.randint(1, max(1, total // 50))
    order, places = staged(documents, lengths, packed, seed=seed)
    seen: Counter[tuple[int, int]] = Counter()
    longest = max(length for _, length in lengths)
    number = 0
    while True:
        (spans,) = order.spans(np.array([number]))
        found = places(spans)
        if any(seen[place] for place in found):
            break  # the second epoch
        length = next(length for first, length in reversed(lengths) if first <= number)
        assert len(found) == length or (packed and len(found) < length)
        seen.update(found)
        number += 1
    assert total - len(seen) < (1 if packed else longest), "tokens of the first epoch were lost"
    (again,) = order.spans(np.array([number]))
    assert sum(seen[place] > 0 for place in places(again)) == len(places(again)), "the epoch ended early"


@pytest.mark.parametrize("packed", [False, True])
def test_staged_samples_do_not_depend_on_the_way_they_are_asked_for(packed):
    chance = random.Random(5)
    documents = [[chance.randint(1, 40) for _ in range(6)] for _ in range(8)]
    lengths = [(0, 4), (20, 8), (90, 16), (100, 4)]
    order, _ = staged(documents, lengths, packed)
    whole = order.spans(np.arange(400))
    assert len({tuple(map(tuple, sample)) for sample in whole}) > 280
    for sample in (399, 95, 20, 89, 3):
        fresh, _ = staged(documents, lengths, packed)
        fresh.extend(chance.choice([None, 0, 50, 150]))
        assert fresh.spans(np.array([sample])) == [whole[sample]]
    before, _ = staged(documents, lengths[:1], packed)
    assert before.spans(np.arange(20)) == whole[:20]  # the first stage knows nothing of the next


def test_a_stage_in_a_later_epoch_continues_that_epoch():
    documents = [[10] * 10, [10] * 10]
    order, places = staged(documents, [(0, 10), (25, 20)], packed=False, window=1000)
    second = {place for spans in order.spans(np.arange(20, 25)) for place in places(spans)}
    rest = [place for spans in order.spans(np.arange(25, 25 + 7)) for place in places(spans)]
    assert len(second) == 50 and len(rest) == len(set(rest)) == 140 and second.isdisjoint(rest)
    third = [place for spans in order.spans(np.arange(32, 42)) for place in places(spans)]
    assert len(set(third)) == 200


def test_tokens_of_a_staged_order_are_awaited_without_blocking():
    ready = {0}

    def spans_in(shards: np.ndarray, wait: bool) -> list[TokenSpan] | None:
        assert not wait
        return [TokenSpan(int(shards[0]), 0, 40)] if int(shards[0]) in ready else None

    order = StagedOrder(
        [(0, 4), (12, 8)], lambda length, rest=None: SampleOrder(3, spans_in, length, 0, 40, None, rest)
    )
    ready |= {int(order.wanted_shards()[0])}
    assert order.extend(9, wait=False) and not order.extend(14, wait=False)
    known = order.num_known
    ready |= {0, 1, 2}
    assert order.extend(14, wait=False) and order.num_known > known
    assert len(order.spans(np.array([14]))[0]) > 0
