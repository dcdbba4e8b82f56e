"""Word lists of the tasks: adjectives, nouns, verbs, and names for entity cards.  Fixed; no word is in two of the first three."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from lcx import texts

ADJECTIVES = """
able absent amber ample ancient ashen austere autumn awake azure balanced bare bashful bitter blank bleak blunt bold brave
breezy brief bright brisk broad bronze calm candid careful careless chilly civil clean clever cloudy coarse cobalt copper cosmic
cozy crimson crisp crooked curious curly damp dapper daring deep dense distant dizzy double drowsy dusty eager early earnest
eastern easy elastic elder elegant emerald empty endless exact faint fair famous fancy fearless fierce final firm flat fluent
foggy formal fragile frank fresh frosty frozen gallant gentle giant gifted glad gleaming glossy golden graceful grand grateful
hasty hazy hearty hidden hollow honest humble icy idle inner ivory jolly keen kind late lavish lazy lively lofty lonely loud
loyal lucky lunar marble meek mellow merry mighty mild misty modest muddy narrow neat nervous nimble noble northern odd olive
opal pale patient plain playful polite prime proud pure quaint quick quiet rapid rare restless rich robust rough royal ruby
rural rustic salty scarlet secret serene shady sharp shiny shy silent silky silver simple sleepy slender smooth snowy sober
solar solemn solid somber southern spare sparse steady steep stern still stormy sturdy subtle sudden sunny swift tall tame
tardy teal tender thirsty thorny tidy timid tiny tranquil upper urban vague vast velvet violet vital vivid wary weary western
wild windy wise witty wooden young zealous
""".split()

NOUNS = """
acorn airport almond anchor ankle antler apple apron arcade archway armor arrow atlas attic avenue badge bakery balcony ballad
banjo banner barley barn barrel basin basket beacon beaver bell bench berry bicycle blanket blossom boat bonnet boulder bracket
branch bridge broom brush bucket buckle bugle butter button cabin cabinet cable cactus camel camera canal candle canoe canvas
canyon captain caravan carbon cargo carpet carrot castle cathedral cavern cedar cellar cello chalk chapel charcoal cherry chess
chimney cider circus clarinet cliff clock clover coach coconut coffee collar column comet compass cookie coral cottage cotton
crane crater crayon cricket crown crystal cupboard curtain cushion daisy desert diamond dinner dolphin donkey dragon drawer
drum eagle easel elbow ember engine envelope falcon feather fence ferry fiddle finger fireplace flag flannel flask flute forest
fork fossil fountain fox freckle furnace galaxy garden garlic garnet gate geyser ginger glacier glove goblet goose gorge grape
gravel guitar hammer hamlet hammock harbor harp harvest hatchet hazel hedge helmet heron hill hinge honey horizon hornet horse
hotel iceberg inkwell island ivy jacket jasmine jewel jigsaw journal juniper kayak kettle keyboard kitchen kite ladder lagoon
lake lamp lantern lark laurel leaf ledger lemon lentil letter lettuce library lighthouse lily linen lizard locket lumber magnet
magpie mango mantle maple market marsh meadow melon mirror mitten monastery moose mosaic moth mountain museum mushroom mustard
napkin nectar needle nest notebook nutmeg oak oasis oatmeal ocean onion orbit orchard orchid organ otter oven owl oyster paddle
palace panther paper parade parcel parrot pasture pavement peach peacock peanut pebble pelican pencil pepper piano pigeon pillar
pillow pine pistachio pitcher planet plaza plum pocket pond poplar porch potato prairie prism pulley pumpkin puppet puzzle
quarry quartz quill quilt rabbit radish raft railway raisin raven ribbon river robin rocket rooster rope rudder saddle saffron
sail salmon sandal satchel saucer scarf school scissors seagull shadow shelf shell shovel shutter signal skillet sled slipper
snail sparrow spice spider spindle spinach spoon spruce squirrel stable statue stream sugar summit sundial swallow tablet teapot
temple thimble thistle thunder ticket tiger timber toast tomato torch tower tractor trail trumpet tulip tunnel turnip turtle
valley vase village vineyard violin volcano wagon walnut walrus waterfall wheat wheel whistle willow window winter wolf yarn
zebra zipper
""".split()

VERBS = """
accept admire adopt advise agree allow announce answer appear argue arrive assist attend avoid bake balance beg begin behave
believe belong blink boil borrow bounce bow breathe bring build burn bury carry carve catch cheer chew choose clap climb
collect compare complain confess connect consider cook cough crawl create cross cry dance decide declare decorate defend deliver
depend describe deserve dig dine disagree discover divide draw dream dress drift drink drive earn eat enjoy enter escape examine
exist expand explain explore fasten fetch fill find float follow forget forgive gather giggle give glide greet grow guess handle
hang happen heal hear help hesitate hide hurry imagine improve include inform inspect invent invite join juggle jump kneel
knock know laugh learn leave lend lift listen lose manage march measure mend mention mix move nod notice obey observe obtain
occur offer open order owe perform persuade pour practice praise prefer prepare pretend promise protect prove provide pull
punish push raise reach read realize receive recite recover refuse rejoice relax remain remember remind remove repair repeat
replace reply rescue retire return reveal ride roar roll rub run save scatter scrub search seem select sell send separate settle
sew shake share shiver shout sing sit sketch slide smile sneeze solve speak spell spend spread squeeze stare stitch strive
suggest suppose surprise survive swim teach tell thank think throw tie travel tremble trust try unite untie vanish visit wait
walk wander warn wash watch wave weave weep whisper win wink wonder worry wrap write yawn yell
""".split()

FIRST_NAMES = """
Ada Agnes Albert Alma Amos Anita Arthur Astrid Basil Beatrice Benno Berta Boris Carla Casper Celia Clara Conrad Cora Cyrus
Dagmar Delia Dora Edgar Edith Edwin Elias Elsa Emil Erna Esther Felix Fiona Flora Frida Gideon Gloria Greta Gustav Hanna Hector
Hedda Helga Henrik Hilda Hugo Ida Igor Ines Irma Isaac Ivan Jonas Julia Karin Klara Lars Laura Leo Lena
""".split()

LAST_NAMES = """
Abbott Adler Alcott Arden Bauer Beck Bergman Birch Blum Brandt Calder Carver Castell Corbin Dahl Dalton Draper Eckhart Egan
Fenwick Fischer Forsyth Gallo Garner Gruber Haldane Hale Hartley Holm Ingram Jansen Keller Kemp Kirby Lang Larkin Lindgren
Lorenz Marlow Mercer Moller Nash Nolan Norris Olsen Osborn Palmer Parry Quist Ramsay Reed Rowan Sandoval Sutter Tanner Thorne
Ulrich Vance Wagner Weiss Winslow Yates
""".split()

TOWNS = """
Alderbrook Ashford Barnwick Beckham Birkdale Bramley Brentwell Cardigan Caversham Coldharbor Cranfield Dunmore Eastleigh
Elmswell Fairhaven Farnley Glenmoor Grantham Hadleigh Harrowgate Hillcrest Ironbridge Kelsey Kingsbury Lakemont Langford
Longridge Marwick Millbrook Netherby Northwold Oakhurst Overton Penrith Quenby Ravensworth Redcliff Rockford Selby Shelburne
Stonehaven Tamworth Thornbury Underhill Wakefield Westbrook Whitby Wickham Woodstock Yarmouth
""".split()

JOBS = """
architect astronomer baker barber beekeeper blacksmith bookbinder botanist carpenter cartographer chemist composer dentist
electrician engraver farmer gardener geologist glazier goldsmith historian jeweler journalist judge librarian locksmith
mason miller nurse optician painter pharmacist photographer pilot plumber potter sailor sculptor shepherd surgeon tailor
translator veterinarian weaver
""".split()

COLLECTIONS = """
bells bottles buttons candlesticks clocks coins combs compasses dolls feathers fossils keys kites lanterns maps marbles masks
medals minerals mirrors mugs paintings pens postcards puppets ribbons seashells spoons stamps teapots thimbles violins whistles
""".split()


@lru_cache
def word_pools() -> tuple[tuple[str, ...], ...]:
    """Return distinct words for counting, a pool after the other when more are needed.

    Nouns, adjectives and verbs; those and the novel's other lower-case words of four letters or more; two nouns written as one word.
    """
    small = (*NOUNS, *ADJECTIVES, *VERBS)
    novel = set(re.findall(r"(?<![\w'-])[a-z]{4,}(?![\w'-])", texts.read("pride_and_prejudice")))
    pairs = {first + second for first in NOUNS for second in NOUNS}
    return small, (*small, *sorted(novel - set(small))), tuple(sorted(pairs - novel - set(small)))


def distinct_words(rng: np.random.Generator, count: int) -> list[str]:
    """Return `count` different words in random order, from the smallest pool that has them; fewer if no pool has."""
    pools = word_pools()
    pool = next((pool for pool in pools if len(pool) >= count), pools[-1])
    return [pool[i] for i in rng.permutation(len(pool))[:count]]
