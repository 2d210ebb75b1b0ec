"""A worker's places: never more at once than there are, and nobody is passed over."""

from __future__ import annotations

import asyncio

import pytest

from ergo_rl.actors.rollout_worker import FairSemaphore


def test_acquire_respects_capacity_and_order() -> None:
    """Ten places. 4 and 5 go in, 3 has to wait, and 1, which would fit, behind it; 25 takes all ten."""
    inside, order, most = 0, list[str](), 0

    async def one(places: FairSemaphore, name: str, count: int, held: int) -> None:
        nonlocal inside, most
        async with places.acquire(count):
            order.append(name)
            inside += held
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= held

    async def story() -> None:
        asked = {"four": (4, 4), "five": (5, 5), "three": (3, 3), "one": (1, 1), "all": (25, 10), "last": (10, 10)}
        places = FairSemaphore(10)
        await asyncio.wait_for(asyncio.gather(*(one(places, name, *sizes) for name, sizes in asked.items())), 10)

    asyncio.run(story())
    assert order == ["four", "five", "three", "one", "all", "last"] and most == 10


def test_acquire_after_error_or_cancellation_frees_places() -> None:
    async def story() -> None:
        places = FairSemaphore(2)
        with pytest.raises(ValueError, match="no picture"):
            async with places.acquire(2):
                waiting = asyncio.create_task(places.acquire(1).__aenter__())
                await asyncio.sleep(0)
                waiting.cancel()
                raise ValueError("no picture")
        async with asyncio.timeout(5), places.acquire(2):
            pass

    asyncio.run(story())
