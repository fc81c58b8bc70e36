import threading
import time
from itertools import chain

import pytest
import torch

from tests.activations.sources import MemorySource, numbered
from topk_ortho.activations.batches import Batches, Stopped


@pytest.fixture
def open_batches():
    opened = []

    def open_(*arguments, **keywords):
        opened.append(Batches(*arguments, **keywords))
        return opened[-1]

    yield open_
    for batches in opened:
        batches.close()


def take(batches, n):
    return [next(batches).squeeze(1).tolist() for _ in range(n)]


def tokens(lists):
    return list(chain.from_iterable(lists))


@pytest.mark.quick
def test_an_epoch_visits_every_token_once_in_a_new_order(open_batches):
    batches = open_batches(numbered([10] * 6), list(range(6)), 5, buffer_tokens=1000, seed=0)
    assert batches.n_pools == 1
    epochs = [tokens(take(batches, 12)) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(60))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_pools_bound_what_is_in_memory_and_mix_their_shards(open_batches):
    source = numbered([10] * 12)
    batches = open_batches(source, list(range(12)), 10, buffer_tokens=40, seed=0)
    assert batches.n_pools == 3
    next(batches)
    while len(source.asked) < 8:  # the next pool is filled while this one is used, and no more than that
        time.sleep(0.001)
    time.sleep(0.01)
    assert len(source.asked) == 8
    first_pool = take(batches, 3)
    assert len({token // 10 for token in first_pool[0]}) > 1


def test_epochs_deal_out_the_shards_anew(open_batches):
    batches = open_batches(numbered([10] * 12), list(range(12)), 10, buffer_tokens=40, seed=0)
    epochs = [take(batches, 12) for _ in range(2)]
    pools = [
        [{token // 10 for batch in epoch[4 * n : 4 * n + 4] for token in batch} for n in range(3)] for epoch in epochs
    ]
    assert [sorted(tokens(epoch)) for epoch in epochs] == [list(range(120))] * 2
    assert set(map(frozenset, pools[0])) != set(map(frozenset, pools[1]))


@pytest.mark.parametrize("buffer_tokens", [25, 60, 10_000], ids=["many_pools", "few_pools", "one_pool"])
def test_any_position_continues_as_if_uninterrupted(open_batches, buffer_tokens):
    sizes = [7, 11, 13, 5, 9, 17, 3, 12]
    whole = take(open_batches(numbered(sizes), list(range(8)), 4, buffer_tokens, seed=3), 60)
    for position in (0, 1, 5, 17, 18, 19, 40):
        batches = open_batches(numbered(sizes), list(range(8)), 4, buffer_tokens, seed=3, position=position)
        assert take(batches, 60 - position) == whole[position:]
        assert batches.position == 60


def test_only_the_given_shards_are_used(open_batches):
    source = numbered([10] * 6)
    seen = tokens(take(open_batches(source, [1, 4], 5, 1000, seed=0), 4))
    assert sorted(seen) == [*range(10, 20), *range(40, 50)]
    assert set(source.asked) == {1, 4}


def test_seed_decides_the_order(open_batches):
    one, again, other = (take(open_batches(numbered([10] * 6), list(range(6)), 5, 1000, seed=s), 12) for s in (0, 0, 1))
    assert one == again
    assert one != other


def test_batches_are_full_and_float32(open_batches):
    source = MemorySource([torch.zeros(7, 3, dtype=torch.float16)])
    batches = open_batches(source, [0], 4, 1000, seed=0)
    assert [next(batches).shape for _ in range(3)] == [(4, 3)] * 3
    assert next(batches).dtype == torch.float32


def test_shards_smaller_than_a_batch(open_batches):
    batches = open_batches(numbered([3] * 10), list(range(10)), 8, buffer_tokens=1, seed=0)
    assert all(len(batch) == 8 for batch in take(batches, 20))


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the 7 training tokens, got 8"):
        Batches(numbered([3, 4]), [0, 1], 8, 1000, seed=0)


def test_an_error_of_the_source_reaches_the_loop(open_batches):
    source = numbered([10] * 4)
    source.shard = lambda number: (_ for _ in ()).throw(OSError("no more disk"))
    with pytest.raises(OSError, match="no more disk"):
        next(open_batches(source, list(range(4)), 5, 1000, seed=0))


def test_stop_cuts_waiting_short(open_batches):
    source, release = numbered([10] * 4), threading.Event()
    source.shard = lambda number: release.wait() and source.shards[number]
    batches = open_batches(source, list(range(4)), 5, 1000, seed=0)
    batches.stop()
    with pytest.raises(Stopped):
        next(batches)
    release.set()


def test_the_pool_is_what_the_next_batches_are_of(open_batches):
    batches = open_batches(numbered([10] * 12), list(range(12)), 10, buffer_tokens=40, seed=0)
    pool = batches.pool.squeeze(1).tolist()
    assert sorted(tokens(take(batches, 4))) == sorted(pool)
    assert sorted(batches.pool.squeeze(1).tolist()) == sorted(pool)


def test_close_ends_filling_at_the_next_shard(open_batches):
    source, begun, release = numbered([10] * 40), threading.Event(), threading.Event()
    shard = source.shard

    def slow(number):
        result = shard(number)
        begun.set()
        release.wait()
        return result

    source.shard = slow
    batches = open_batches(source, list(range(40)), 5, 1000, seed=0)
    begun.wait()
    batches.stop()
    release.set()
    batches.close()
    assert len(source.asked) == 1


def test_shards_of_a_buffer_lie_in_it_whole(open_batches):
    source = numbered([3, 1, 4, 1, 5])
    batches = open_batches(source, [0, 2, 3, 4], 2, 1000, seed=0)
    assert batches.pool.squeeze(1).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
