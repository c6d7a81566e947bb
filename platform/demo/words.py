"""Words, real and invented.

A model that sees only a few hundred real words memorises them.  Invented words make the supply
endless, so the only way to answer is to learn the rule.
"""

from __future__ import annotations

import random
import string

GREETINGS: tuple[str, ...] = ("hello", "hi", "hey", "greetings", "howdy", "welcome")

REAL_WORDS: tuple[str, ...] = tuple(
    """
    able acorn actor admit adult agent alarm album amber anchor angel angle animal ankle apple
    april apron arch arena arrow artist atlas attic august author autumn awake baby bacon badge
    baker balance ball bamboo banana band banjo bank barrel basket bath beach beacon bean bear
    beauty bench berry bicycle bird biscuit blanket blue board boat body bone book boot bottle
    bowl box branch brass bread brick bridge broom brother brush bubble bucket buffalo bush butter
    button cabin cable cactus cake camel camera camp canal candle candy canoe canvas captain card
    cargo carpet carrot castle cat cattle cave cello chair chalk cheese cherry chess chest chicken
    child church cinema circle city clay clever cliff clock cloth cloud clover coach coast cobra
    coffee coin color comet compass computer cookie copper coral corner cotton couch country
    cousin crab crane crayon cream cricket crown crystal curtain daisy dance danger daughter dawn
    day deer desert desk diamond diary dinner dish doctor dog donkey door dragon drawer dream
    dress drum duck dusk dust eagle early earth echo eel elbow elephant ember engine envelope
    evening face factory family farm feather fence ferry fiddle field finger fire fish flag flame
    flower flute fly forest fork fox frame friend frog frost fruit garage garden garlic gate giant
    ginger giraffe glass glove goat gold goose grain granite grape grass green guitar hammer hand
    harbor harp hat hawk hazel heart hedge helmet hero hill hobby holiday honey hood horn horse
    hotel house hunter ice igloo ink insect island ivory jacket jaguar jam jar jelly jewel jigsaw
    journey judge juice jungle kettle key king kitchen kite kitten knee knight knot koala ladder
    lady lake lamp lava leaf leather lemon letter library light lily lime lion lizard llama lobster
    lock lunch lynx magnet mango map maple marble market mask meadow melon metal mint mirror money
    monkey month moon morning mother motor mountain mouse museum mushroom music nail napkin needle
    nest night noodle north notebook number oak oasis ocean office olive onion orange orbit orchid
    organ otter oven owl oxygen oyster paddle page painter palace palm panda paper parrot party
    path peach peanut pearl pebble pencil penguin penny piano picnic picture pigeon pillow pilot
    pirate planet plate plum pocket poem pond pony potato prince pumpkin puppy puzzle quartz queen
    quiet quilt rabbit radio rain raven ribbon rice ring river road robin robot rocket roof rope
    rose ruby sailor salad salmon salt sand scarf school season secret seed shadow shark sheep
    shell ship shirt shore silver singer sister skirt sky snail snow soap sock spider spoon spring
    square squirrel stable star station stone storm story street student sugar summer sun swan
    sweater sword table tailor teacher temple tent thunder tiger timber toast tomato tool tower
    town toy train tree trumpet tulip tunnel turtle umbrella uncle valley vanilla vase velvet
    village violin voice volcano wagon walnut water whale wheat wheel whistle window winter wolf
    wonder wood world yellow zebra
    """.split()
)

_ONSETS = tuple(
    "b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sm "
    "sn sp st str sw th tr wh".split()
)
_NUCLEI = tuple("a e i o u a e i o u ai ea ee ia io oa oo ou y".split())
_CODAS = ("", "", "", *"b ck d f g k l ll m n nd ng nt p r rd rn s ss st t th x z sh ch".split())

MIN_LENGTH = 2
MAX_LENGTH = 10


def invented_word(rng: random.Random) -> str:
    """A pronounceable word: syllables until a random target length is reached."""
    target = rng.randint(3, MAX_LENGTH)
    word = "" if rng.random() < 0.8 else rng.choice("aeiou")
    while len(word) < target:
        word += rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
    return word[:target]


def scrambled_word(rng: random.Random) -> str:
    """Letters at random: no spelling habit helps, so copying has to be exact."""
    length = rng.randint(MIN_LENGTH, MAX_LENGTH)
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def any_word(rng: random.Random) -> str:
    """One lower-case word from the whole mixture."""
    draw = rng.random()
    if draw < 0.02:
        return rng.choice(GREETINGS)
    if draw < 0.20:
        return rng.choice(REAL_WORDS)
    if draw < 0.70:
        return invented_word(rng)
    return scrambled_word(rng)
