"""The sentences of corpus ``voice_commands``: a small seeded grammar of commands to a device."""

from __future__ import annotations

import random
import re

_NUMBERS = """ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE THIRTEEN FOURTEEN FIFTEEN
SIXTEEN SEVENTEEN EIGHTEEN NINETEEN"""
_ONES = _NUMBERS.split()
_TENS = ["TWENTY", "THIRTY", "FORTY", "FIFTY", "SIXTY", "SEVENTY", "EIGHTY", "NINETY"]

# A code's letters carry a mark that distinguishes them from the words A and I.
_LETTERS = [f"~{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
_SPOKEN = {"~A": "eigh", "~I": "eye"}  # alone, espeak-ng would take these two for words

_GRAMMAR = """
sentence: <please> <device> | <please> <device> | <please> <climate> | <please> <timer> |
    <please> <timer> | <please> <reminder> | <please> <call> | <please> <message> | <please> <media> |
    <please> <shopping> | <please> <schedule> | <question> | <code> | <code> | <dial>
please: _ | _ | _ | _ | PLEASE | NOW | HEY HOUSE | OKAY HOUSE | COULD YOU
device: TURN <onoff> THE <room> <thing> | SWITCH <onoff> THE <thing> IN THE <room> |
    <openclose> THE <room> <opening> | DIM THE <room> <lamp> TO <percent> PERCENT |
    MAKE THE <room> <lamp> <colour>
climate: SET THE <room> TO <degrees> DEGREES | MAKE THE <room> <degree> DEGREES WARMER |
    KEEP THE <room> BELOW <degrees> DEGREES UNTIL <clock>
timer: SET A TIMER FOR <n60> MINUTES | SET A TIMER FOR <n12> HOURS AND <n60> MINUTES |
    START A <n60> MINUTE TIMER FOR THE <food> | WAKE ME UP AT <clock> |
    SET AN ALARM FOR <clock> ON <day> | CANCEL THE <clock> ALARM | ADD <n60> SECONDS TO THE <food> TIMER
reminder: REMIND ME TO <task> AT <clock> | REMIND <name> TO <task> ON <day> |
    REMIND ME TO <task> IN <n60> MINUTES
call: CALL <name> <surname> | CALL <name> AT WORK | RING DOCTOR <surname> |
    CALL <name> <surname> ON SPEAKER
message: TELL <name> I WILL BE <n60> MINUTES LATE | SEND A MESSAGE TO <name> <surname> |
    ASK <name> TO <task> | TELL <name> TO MEET ME IN <city> AT <clock>
media: PLAY SOME <music> IN THE <room> | SET THE VOLUME TO <percent> PERCENT | SKIP TO TRACK <n99> |
    PLAY STATION <n99> POINT <digit> | STOP THE <music> IN THE <room> | GO BACK <n60> SECONDS
shopping: ADD <n12> <item> TO THE SHOPPING LIST | PUT <item> AND <item> ON THE LIST |
    ORDER <n12> BOXES OF <item>
schedule: MOVE MY <clock> MEETING TO <day> | BOOK A TABLE FOR <n12> IN <city> ON <day> |
    WHAT IS ON MY CALENDAR ON <month> <ordinal> | FIND A TRAIN TO <city> ON <month> <ordinal>
question: WHAT IS THE WEATHER IN <city> ON <day> | HOW MUCH IS <n99> <operation> <n99> |
    HOW FAR IS IT TO <city> | WHAT TIME IS IT IN <city> | HOW MANY <item> ARE LEFT |
    WILL IT <weather> IN <city> ON <day> | IS THE <thing> STILL ON IN THE <room>
code: MY CODE IS <letter> <digit> <letter> | THE CODE IS <letter> <letter> <digit> <digit> |
    UNLOCK THE <opening> WITH <digit> <letter> <digit> <letter> |
    SPELL IT <letter> <letter> <letter> <letter> |
    NUMBER PLATE <letter> <letter> <digit> <digit> <letter> |
    FLIGHT <letter> <letter> <digit> <digit> <digit>
dial: DIAL <digit> <digit> <digit> <digit> <digit> |
    DIAL <digit> <digit> <digit> <digit> <digit> <digit> <digit> |
    MY PIN IS <digit> <digit> <digit> <digit>
onoff: ON | OFF
openclose: OPEN | CLOSE | LOCK | UNLOCK
room: KITCHEN | BEDROOM | BATHROOM | LIVING ROOM | GARAGE | HALLWAY | OFFICE | CELLAR | NURSERY |
    BALCONY
lamp: LIGHT | LIGHTS | LAMP
thing: LIGHT | LIGHTS | LAMP | FAN | HEATER | RADIO | SPEAKER | TELEVISION | OVEN | CAMERA
opening: DOOR | WINDOW | BLINDS | CURTAINS | GATE | SAFE
colour: RED | GREEN | BLUE | WARM WHITE | ORANGE | PURPLE | BRIGHTER | DARKER
food: EGGS | PASTA | BREAD | RICE | SOUP | CAKE | TEA | PIZZA
item: APPLES | EGGS | LEMONS | BATTERIES | COFFEE | MILK | ONIONS | CANDLES | RICE | PAPER TOWELS
task: WATER THE PLANTS | FEED THE CAT | TAKE OUT THE BINS | BUY STAMPS | CHARGE THE CAR |
    CALL THE DENTIST | PAY THE RENT | WALK THE DOG | EMPTY THE DISHWASHER | PICK UP THE PARCEL
music: JAZZ | MUSIC | NEWS | OPERA | PIANO MUSIC | ROCK | BIRD SONG
weather: RAIN | SNOW | BE SUNNY | FREEZE | BE WINDY
operation: PLUS | MINUS | TIMES | DIVIDED BY
day: MONDAY | TUESDAY | WEDNESDAY | THURSDAY | FRIDAY | SATURDAY | SUNDAY
month: JANUARY | MARCH | APRIL | MAY | JUNE | JULY | OCTOBER | DECEMBER
ordinal: FIRST | SECOND | THIRD | FOURTH | FIFTH | TENTH | TWELFTH | TWENTIETH | THIRTIETH
city: LONDON | PARIS | BERLIN | ROME | MADRID | OSLO | BOSTON | DENVER | DELHI | TOKYO | CAIRO | LIMA
name: ANNA | BEN | CLARA | DAVID | EMMA | FRANK | GRACE | HENRY | IRIS | JACK | KAREN | LEO | MARIA |
    NINA | OSCAR | PETER | ROSA | SAM | TINA | VICTOR
surname: ADAMS | BAKER | CARTER | DIXON | ELLIS | FOSTER | GRANT | HUNTER | JONES | KELLY | LAMBERT |
    MILLER | NORTON | PARKER | RIVERS | STONE | TURNER | WALKER | YOUNG
"""  # <symbol>, alternatives after |, _ for nothing; more indented lines go on


def _parse(grammar: str) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for line in grammar.strip().replace("\n    ", " ").splitlines():
        symbol, _, alternatives = line.partition(":")
        rules[symbol] = [words.strip().removeprefix("_") for words in alternatives.split("|")]
    return rules


_RULES = {**_parse(_GRAMMAR), "letter": _LETTERS, "digit": _ONES[:10]}


def _number(value: int) -> str:
    """0 to 99 in words."""
    if value < 20:
        return _ONES[value]
    tens = _TENS[value // 10 - 2]
    return tens if value % 10 == 0 else f"{tens} {_ONES[value % 10]}"


def _clock(rng: random.Random) -> str:
    hour = _ONES[rng.randint(1, 12)]
    minute = rng.choice(["", "FIFTEEN", "THIRTY", "FORTY FIVE", _number(rng.randint(10, 59))])
    return f"{hour} {minute} {rng.choice(['', '', 'IN THE MORNING', 'TONIGHT'])}"


def _expand(symbol: str, rng: random.Random) -> str:
    if symbol == "clock":
        return _clock(rng)
    ranges = {"n12": (2, 12), "n60": (2, 59), "n99": (1, 99), "degrees": (15, 27), "degree": (2, 9)}
    if symbol in ranges:
        return _number(rng.randint(*ranges[symbol]))
    if symbol == "percent":
        return _number(rng.randrange(5, 100, 5))
    chosen = rng.choice(_RULES[symbol])
    return re.sub(r"<(\w+)>", lambda match: _expand(match[1], rng), chosen)


def sentence(rng: random.Random) -> tuple[str, str]:
    """A sentence: (its text in capitals, codes as letters with spaces; what a synthesiser is given)."""
    words = _expand("sentence", rng).split()
    text = " ".join(word.removeprefix("~") for word in words)
    return text, " ".join(_SPOKEN.get(word, word.removeprefix("~").lower()) for word in words)


def sentences(count: int, rng: random.Random, avoid: set[str]) -> list[tuple[str, str]]:
    """``count`` sentences, none of them in ``avoid`` or twice, as far as the grammar reaches.

    Args:
        count: how many.
        rng: a fresh one gives the same sentences again.
        avoid: texts of other splits; not changed.
    """
    result: list[tuple[str, str]] = []
    own: set[str] = set()
    while len(result) < count:
        drawn = sentence(rng)
        for _ in range(20):  # after so many in vain, a repetition is what the grammar has left
            if drawn[0] not in avoid and drawn[0] not in own:
                break
            drawn = sentence(rng)
        own.add(drawn[0])
        result.append(drawn)
    return result
