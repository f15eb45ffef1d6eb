"""A slow recogniser of the dialects, written from the EBNF in docs/grammar.md.

It shares no code with the package. Every rule of the EBNF is a generator: it yields the set of ids that may
come next, and is sent the id that came.
"""

TEXT_SIZE = 256
CODES = 4
EOL, EOF, BOS, EOS, IMG, BOI, EOI = 459, 460, 462, 463, 464, 465, 466
FIRST_CODE = 467

TEXT = frozenset(range(TEXT_SIZE))
VISION = frozenset(range(FIRST_CODE, FIRST_CODE + CODES))
DIGIT = frozenset(b"0123456789")
NONZERO = frozenset(b"123456789")
STAR = ord("*")
POINT = ord(".")


def count(after):
    """count = nonzero , 3 * [ digit ] ; returns its value and the id that ended it."""
    value = (yield NONZERO) - ord("0")
    for _ in range(3):
        token = yield DIGIT | after
        if token in after:
            return value, token
        value = 10 * value + token - ord("0")
    return value, (yield after)


def decimal(after):
    """decimal = count , [ fraction ] | "0" , fraction ; returns the id that ended it."""
    token = yield DIGIT
    if token == ord("0"):
        yield frozenset([POINT])
        return (yield from fraction(after))
    for _ in range(3):
        token = yield DIGIT | after | {POINT}
        if token in after:
            return token
        if token == POINT:
            return (yield from fraction(after))
    token = yield after | {POINT}
    return token if token in after else (yield from fraction(after))


def fraction(after):
    """fraction = "." , 2 * [ digit ] , nonzero ; returns the id that ended it."""
    last = yield DIGIT
    for remaining in (1, 0):
        expected = DIGIT if remaining else NONZERO
        if last != ord("0"):
            expected = expected | after
        token = yield expected
        if token in after and last != ord("0"):
            return token
        last = token
    return (yield after)


def released_frame(height, width):
    """frame of emu3: { row , EOL } , EOF."""
    for _ in range(height):
        for _ in range(width):
            yield VISION
        yield frozenset([EOL])
    yield frozenset([EOF])


def plain_frame(height, width):
    """frame of a video in emu3-frames: { row } , EOF."""
    for _ in range(height * width):
        yield VISION
    yield frozenset([EOF])


def joined_frame(height, width):
    """frame of emu3.5: row , { EOL , row }."""
    for row in range(height):
        if row:
            yield frozenset([EOL])
        for _ in range(width):
            yield VISION


def span(dialect):
    star, img = frozenset([STAR]), frozenset([IMG])
    first, _ = yield from count(star)
    second, ending = yield from count(img if dialect == "emu3.5" else star | img)
    if ending == IMG:
        frame = joined_frame if dialect == "emu3.5" else released_frame
        yield from frame(first, second)
    elif dialect == "emu3":
        third, _ = yield from count(star)
        yield from decimal(star)
        yield from decimal(img)
        for _ in range(first):
            yield from released_frame(second, third)
    else:
        third, _ = yield from count(img)
        for _ in range(first):
            yield from plain_frame(second, third)
    yield frozenset([EOI])


def document(dialect):
    yield frozenset([BOS])
    while (token := (yield TEXT | {BOI, EOS})) != EOS:
        if token == BOI:
            yield from span(dialect)


def recognise(dialect, ids, rule=document):
    """("valid", length), ("malformed", position) or ("incomplete", length); and what may follow."""
    following = rule(dialect)
    expected = next(following)
    for position, token in enumerate(ids):
        if token not in expected:
            return ("malformed", position), expected
        try:
            expected = following.send(token)
        except StopIteration:
            expected = frozenset()
    return ("incomplete" if expected else "valid", len(ids)), expected
