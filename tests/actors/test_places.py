"""A worker's places: never more at once than there are, and nobody is passed over."""

from __future__ import annotations

import asyncio

import pytest

from ergo_rl.actors.rollout_worker import Places


def test_never_more_at_once_and_first_come_first_served() -> None:
    """Ten places. 4 and 5 go in, 3 has to wait, and 1, which would fit, behind it; 25 takes all ten."""
    inside, order, most = 0, list[str](), 0

    async def one(places: Places, name: str, count: int, held: int) -> None:
        nonlocal inside, most
        async with places.taken(count):
            order.append(name)
            inside += held
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= held

    async def story() -> None:
        asked = {"four": (4, 4), "five": (5, 5), "three": (3, 3), "one": (1, 1), "all": (25, 10), "last": (10, 10)}
        places = Places(10)
        await asyncio.wait_for(asyncio.gather(*(one(places, name, *sizes) for name, sizes in asked.items())), 10)

    asyncio.run(story())
    assert order == ["four", "five", "three", "one", "all", "last"] and most == 10


def test_who_fails_or_gives_up_leaves_no_place_taken() -> None:
    async def story() -> None:
        places = Places(2)
        with pytest.raises(ValueError, match="no picture"):
            async with places.taken(2):
                waiting = asyncio.create_task(places.taken(1).__aenter__())
                await asyncio.sleep(0)
                waiting.cancel()
                raise ValueError("no picture")
        async with asyncio.timeout(5), places.taken(2):
            pass

    asyncio.run(story())
