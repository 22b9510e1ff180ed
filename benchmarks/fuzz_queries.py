"""Fuzzed queries, and a model of what each must cost: an account book in dictionaries that knows nothing of the real
one.

A case is a query drawn at random: good images in any memory layout, or one of many kinds of rubbish; the account's own
token or another's; a fresh key, a used one, or none. The model says whether it has to be answered, at what charge, or
by which exception it has to be refused. An episode is a row of cases against one ledger, which is read again from its
file at the end.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.models import Classifier, build
from simulator.seeding import generator_for
from simulator.service.answers import answer_policy
from simulator.service.ledger import KeyReused, Ledger, OverBudget, Terms, Unauthorised, digest_of, hash_token
from simulator.service.local import LocalTransport
from simulator.service.query import MAX_BATCH, MalformedQuery, Query
from simulator.service.victim import VictimService
from simulator.training.predict import predict

#: of the victim's images
CHANNELS, SIZE, CLASSES = 1, 8, 3
VICTIM = "v"
#: characters of a refusal at most: nobody is sent back what he sent
LONGEST = 300
#: answer mode and budget of each account
ACCOUNTS = {"ann": ("soft", 60), "bob": ("hard", 25), "Zoë \u2028": ("top-2", 7)}


def token_of(account: str) -> str:
    """The secret of an account."""
    return f"secret of {account}"


def victim() -> Classifier:
    """The model that answers."""
    return build("linear", channels=CHANNELS, size=SIZE, classes=CLASSES, generator=generator_for("fuzz")).eval()


def terms(account: str) -> Terms:
    """What an account is opened for."""
    labels, budget = ACCOUNTS[account]
    return Terms(VICTIM, labels, budget, hash_token(token_of(account)))


# -- images -------------------------------------------------------------------------------------------------------


def plain(dice: Random, count: int, dtype: Any = None) -> NDArray[Any]:
    """Good images in the usual layout. There are few of them, so that keys meet the same ones again."""
    rng = np.random.default_rng(dice.randrange(3))
    drawn = rng.integers(0, 256, (count, CHANNELS, SIZE, SIZE), dtype=np.uint8)
    if (dtype or dice.choice([np.uint8, np.float32])) == np.uint8:
        return drawn
    return drawn.astype(np.float32) / np.float32(255)


def _read_only(images: NDArray[Any]) -> NDArray[Any]:
    images.flags.writeable = False
    return images


def _unaligned(images: NDArray[Any]) -> NDArray[Any]:
    room = np.zeros(images.nbytes + 1, np.uint8)
    moved = room[1:].view(images.dtype).reshape(images.shape)
    moved[:] = images
    return moved


#: the same images in another layout of memory, or as a subclass
LAYOUTS: tuple[Callable[[NDArray[Any]], Any], ...] = (
    lambda images: images,
    lambda images: np.asfortranarray(images),
    lambda images: np.repeat(images, 2, axis=0)[::2],
    lambda images: images[::-1].copy()[::-1],
    lambda images: np.ascontiguousarray(images[..., ::-1])[..., ::-1],
    lambda images: np.moveaxis(np.ascontiguousarray(np.moveaxis(images, 1, -1)), -1, 1),
    _read_only,
    _unaligned,
    lambda images: np.broadcast_to(images[:1], images.shape) if (images == images[:1]).all() else images,
    lambda images: np.ma.masked_array(images, mask=images > 0.5),
)


def _with(dice: Random, value: float) -> NDArray[np.float32]:
    images = plain(dice, dice.randint(1, 4), np.float32)
    images.flat[dice.randrange(images.size)] = value
    return images


def _of_type(dice: Random) -> NDArray[Any]:
    names = ["?", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f8", "c8", "c16", "O", "U3", "S3", "V4", "M8[s]"]
    names += ["m8[s]", ">f4", ">u2", "g"]
    dtype = np.dtype([("a\nb", "f4")]) if dice.random() < 0.1 else np.dtype(dice.choice(names))
    return np.zeros((dice.randint(1, 3), CHANNELS, SIZE, SIZE), dtype)


def _of_shape(dice: Random) -> NDArray[Any]:
    shape = tuple(dice.choice([0, 1, 2, SIZE - 1, SIZE, SIZE + 1]) for _ in range(dice.randint(0, 6)))
    if len(shape) == 4 and shape[1:] == (CHANNELS, SIZE, SIZE) and shape[0]:
        shape = (*shape, 1)
    return np.zeros(shape, dice.choice([np.uint8, np.float32]))


def _too_many(dice: Random) -> NDArray[Any]:
    """More images than a query may have; of the larger ones no memory holds a copy."""
    count = dice.choice([MAX_BATCH + 1, 10**6, 10**12])
    return np.broadcast_to(np.zeros((1, CHANNELS, SIZE, SIZE), np.uint8), (count, CHANNELS, SIZE, SIZE))


class Trap:
    """Says that it is an array, and raises when it is asked for one."""

    shape, dtype, ndim = (1, CHANNELS, SIZE, SIZE), np.dtype(np.uint8), 4

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise RuntimeError("a trap")

    def __len__(self) -> int:
        raise RuntimeError("a trap")

    def __repr__(self) -> str:
        raise RuntimeError("a trap")


def _no_array(dice: Random) -> object:
    return dice.choice(
        [
            None, 0, 1.5, True, "", "images\nof text", b"\0" * 64, [], [[[[0] * SIZE] * SIZE]], (), {}, {"images": 1},
            {1, 2}, range(4), Trap(), Trap, np.uint8(3), np.float32("nan"), torch.zeros(1, CHANNELS, SIZE, SIZE),
            10**4000, slice(None), Ellipsis, NotImplemented, Query("ann", "", 0, np.zeros(1)), bytearray(64), 1j,
        ]
    )  # fmt: skip


RUBBISH: tuple[Callable[[Random], Any], ...] = (
    _no_array,
    _no_array,
    _of_type,
    _of_shape,
    _of_shape,
    lambda dice: plain(dice, 0),
    lambda dice: _with(dice, dice.choice([np.nan, np.inf, -np.inf])),
    lambda dice: _with(dice, dice.choice([-1e-30, -1.0, 1.0000001, 255.0, 3e38, -3e38])),
    lambda dice: np.ma.masked_invalid(_with(dice, np.nan)),
    lambda dice: plain(dice, 2, np.float32).astype(">f4"),
    lambda dice: plain(dice, 2, np.float32).view("u1"),
)

NO_TEXT: tuple[Any, ...] = (None, 0, 1.5, True, b"ann", ["ann"], {"ann": 1}, ("ann",), {1}, Trap(), np.str_("ann"), 1j)
ODD_TEXT = (
    "",
    " ",
    "ann ",
    "ANN",
    "\0",
    "ann\n",
    "\u2028\n" * 3000,
    "\ud800",
    "é",
    "../ann",
    "' OR 1=1 --",
    "a" * 10**5,
)
NO_KEY: tuple[Any, ...] = (None, "0", 0.0, float("nan"), True, [0], {}, b"0", np.int64(0), Trap(), 1j)
BAD_KEY = (-1, -(2**63), 2**63, 2**64, 10**400, -(10**4000), 10**6000)


@dataclass(frozen=True)
class Case:
    """A query, and whether its images can be answered."""

    query: Any
    good_images: bool


def draw(dice: Random) -> Case:
    """A case: about a third of them are good in every respect."""
    kind = dice.random()
    if kind < 0.02:  # no query at all
        return Case(dice.choice([None, 0, "query", [], {}, Trap(), (1, 2, 3, 4)]), False)
    good = dice.random() < 0.75
    if good:
        images = dice.choice(LAYOUTS)(plain(dice, dice.choice([1, 1, 2, 3, 5, 8, 30])))
    else:
        images = dice.choice(RUBBISH)(dice)
    account: Any = dice.choice(sorted(ACCOUNTS))
    token: Any = token_of(account)
    key: Any = dice.choice([dice.randrange(12), dice.randrange(12), dice.randrange(2**63)])
    part = dice.random()
    if part < 0.08:
        token = dice.choice([*map(token_of, ACCOUNTS), hash_token(token), *ODD_TEXT])
    elif part < 0.14:
        account = dice.choice([*ACCOUNTS, *ODD_TEXT])
    elif part < 0.24:
        key = dice.choice(NO_KEY + BAD_KEY)
    elif part < 0.28:
        account = dice.choice(NO_TEXT)
    elif part < 0.32:
        token = dice.choice(NO_TEXT)
    return Case(Query(account, token, key, images), good)


# -- what must come of it -----------------------------------------------------------------------------------------


@dataclass
class Book:
    """The model: what every account has paid for."""

    paid: dict[str, dict[int, tuple[int, str]]] = field(default_factory=lambda: {name: {} for name in ACCOUNTS})

    def spent(self, account: str) -> int:
        """Images charged."""
        return sum(count for count, _ in self.paid[account].values())

    def expect(self, case: Case) -> type[InputError] | None:
        """How the case must be refused, or None where it must be answered; then it is charged here."""
        query = case.query
        if type(query) is not Query or type(query.account) is not str or type(query.token) is not str:
            return MalformedQuery
        if type(query.key) is not int or not 0 <= query.key < 2**63:
            return MalformedQuery
        if query.account not in ACCOUNTS:
            return Unauthorised
        if not case.good_images:
            return MalformedQuery
        if query.token != token_of(query.account):
            return Unauthorised
        images = np.array(query.images, order="C", subok=False)
        wanted = (len(images), digest_of(images.tobytes()))
        paid = self.paid[query.account]
        if query.key in paid:
            return None if paid[query.key] == wanted else KeyReused
        if self.spent(query.account) + len(images) > ACCOUNTS[query.account][1]:
            return OverBudget
        paid[query.key] = wanted
        return None


@dataclass
class Tally:
    """What a row of cases came to."""

    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """How many there were."""
        return self.answered + sum(self.refused.values())

    def add(self, other: Tally) -> None:
        """Takes another's counts and faults."""
        self.answered += other.answered
        self.refused += other.refused
        self.faults += other.faults


def judge(case: Case, expected: type[InputError] | None, reply: Any, model: Classifier, tally: Tally) -> None:
    """Compares the reply, rows or an exception, with what had to come."""
    if isinstance(reply, BaseException):
        tally.refused[type(reply).__name__] += 1
        text = str(reply)
        if type(reply) is not expected:
            tally.faults.append(f"{type(reply).__name__} ({text[:200]!r}), wanted {expected and expected.__name__}")
        elif len(text.splitlines()) != 1 or len(text) > LONGEST:
            tally.faults.append(
                f"a refusal of {len(text.splitlines())} lines and {len(text)} characters: {text[:200]!r}"
            )
        return
    tally.answered += 1
    if expected is not None:
        tally.faults.append(f"answered {len(reply)} images, wanted {expected.__name__}")
        return
    images = torch.from_numpy(np.array(case.query.images, order="C", subok=False))
    wanted = answer_policy(ACCOUNTS[case.query.account][0])(predict(model, images)).numpy()
    if not np.array_equal(reply, wanted):
        tally.faults.append(f"other answers to {len(images)} images than the model's")


def audit(log: Path, book: Book, tally: Tally) -> None:
    """Compares the ledger's file with the model, grant by grant."""
    ledger = Ledger(log)
    for account in ACCOUNTS:
        found, wanted = ledger.grants(account), book.paid[account]
        if found != wanted or ledger.spent(account) != book.spent(account):
            tally.faults.append(f"{account}: charged {ledger.spent(account)}, wanted {book.spent(account)}")
    if set(ledger.all_spent()) != set(ACCOUNTS):
        tally.faults.append(f"accounts {sorted(ledger.all_spent())}")
    ledger.close()


def episode(dice: Random, cases: int) -> Tally:
    """A row of cases against the plain service and a ledger on disk."""
    tally, book, model = Tally(), Book(), victim()
    service = VictimService(torch.device("cpu"))
    service.add(VICTIM, model)
    with tempfile.TemporaryDirectory(prefix="exsim-fuzz-") as folder:
        log = Path(folder) / "ledger.log"
        ledger = Ledger(log)
        for account in ACCOUNTS:
            ledger.open(account, terms(account))
        transport = LocalTransport(service, ledger)
        for _ in range(cases):
            case = draw(dice)
            expected = book.expect(case)
            try:
                reply: Any = transport.send(case.query)
            except Exception as error:  # whatever comes is judged
                reply = error
            judge(case, expected, reply, model, tally)
            charged = {account: book.spent(account) for account in ACCOUNTS}
            if ledger.all_spent() != charged:
                tally.faults.append(f"charged {ledger.all_spent()}, wanted {charged}")
        ledger.close()
        audit(log, book, tally)
    return tally
