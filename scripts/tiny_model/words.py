"""The words that the story generator draws from.

Every tuple is a category that a story template can name: `{a:toy}` is "a red ball" at the first
mention and `{toy}` is "ball" from then on. Adjectives are drawn per category from `ADJECTIVES`.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _commas(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


GIRLS = _words(
    """Lily Mia Anna Emma Sara Lucy Ella Rose Nora Ruby Zoe Ivy Clara Molly Daisy Hanna Lena Maya
    Nina Alice Eva Grace Amy Julia Sofia Kate Tina Jane Mary Lola Freya Greta Ida Leila Olive
    Penny Sally Sue Tess Vera Wendy Bella Cora Dora Edith Flora Hazel Iris"""
)
BOYS = _words(
    """Tom Ben Sam Max Leo Jack Tim Finn Oscar Noah Paul Peter Adam Theo Henry Jim Joe Luke Milo
    Nick Omar Otto Ray Rob Simon Ted Will Alex Anton Carl Dan Eric Felix Fred George Hugo Ian Ivan
    Jonas Karl Liam Mark Ned Oliver Pablo Ravi Toby Victor"""
)
SHE_PETS = _words(
    """Coco Bella Fluffy Pepper Honey Ginger Bubbles Daisy Poppy Willow Clover Maple Snowy Dot Fern
    Hazel Kiki Lulu Mimi Sandy Mossy Puff Twiggy Pickle Pebble"""
)
HE_PETS = _words(
    """Pip Rusty Biscuit Spot Hop Nibbles Sunny Shadow Patch Dusty Button Whiskers Bruno Benny Gus
    Jojo Momo Nutmeg Olly Rolo Teddy Toffee Waffles Ziggy Bramble"""
)
SYLLABLES = _words(
    """ba bo da di fa fi ga ha jo ka ki la li lo lu ma mi mo na ni no pa pe ra ri ro sa se ta ti
    to va vi za zo"""
)
SHE_ENDS = ("ra", "na", "ka", "la", "da")
HE_ENDS = ("n", "r", "s", "l", "x", "th", "by", "do")

ANIMALS = _words(
    """dog cat fox rabbit bear mouse squirrel owl frog duck pig cow horse sheep goat lamb kitten
    puppy hedgehog turtle deer wolf bird hen donkey monkey elephant lion tiger penguin otter beaver
    badger pony goose raccoon crow snail bee parrot giraffe zebra hippo panda koala kangaroo seal
    crab bunny camel mole hamster lizard swan robin chick dog cat
    fox rabbit bear mouse dog cat fox rabbit bear mouse elephant lion bird duck"""
)
# Without a name these are "she" and all others "he": one thing less to keep in mind.
SHE_KINDS = _words(
    """cat hen cow sheep kitten squirrel bird duck mouse deer bee swan robin chick lamb koala
    kangaroo giraffe zebra otter seal goose owl bunny hamster panda fairy ghost mermaid unicorn"""
)
PETS = ("dog", "cat", "rabbit", "kitten", "puppy", "hamster", "parrot", "turtle", "pony", "bunny")
# Kind and pronoun of people who can be a hero without a name.
PEOPLE = (
    ("king", "he"), ("queen", "she"), ("princess", "she"), ("prince", "he"), ("farmer", "he"),
    ("baker", "he"), ("knight", "he"), ("wizard", "he"), ("fisherman", "he"), ("witch", "she"),
    ("sailor", "he"), ("old man", "he"), ("old woman", "she"), ("painter", "she"),
    ("gardener", "she"), ("tailor", "he"), ("teacher", "she"), ("doctor", "she"), ("pirate", "he"),
    ("shepherd", "he"), ("clown", "he"), ("cook", "she"),
)  # fmt: skip
CREATURES = (
    "dragon",
    "robot",
    "giant",
    "fairy",
    "ghost",
    "elf",
    "troll",
    "unicorn",
    "mermaid",
    "dragon",
    "dragon",
    "robot",
)
ELDERS = (
    ("a wise old owl", "the owl", "she"), ("an old turtle", "the old turtle", "he"),
    ("a kind old woman", "the old woman", "she"), ("a friendly farmer", "the farmer", "he"),
    ("a tall man with a big hat", "the man", "he"), ("a kind baker", "the baker", "she"),
    ("an old fisherman", "the fisherman", "he"), ("a gentle horse", "the horse", "she"),
    ("a tiny blue bird", "the blue bird", "she"), ("a big brown bear", "the bear", "he"),
    ("a clever crow", "the crow", "he"), ("a small grey mouse", "the mouse", "she"),
    ("a gardener with a green coat", "the gardener", "he"), ("a white goose", "the goose", "she"),
    ("an old woman with silver hair", "the old woman", "she"),
)  # fmt: skip
FAMILY = (
    ("mother", "she"), ("father", "he"), ("grandmother", "she"), ("grandfather", "he"),
    ("big sister", "she"), ("big brother", "he"), ("aunt", "she"), ("uncle", "he"),
)  # fmt: skip

CHILD_ADJECTIVES = ("little", "young", "small", "kind", "clever", "cheerful", "curious", "quiet")
ANIMAL_ADJECTIVES = (
    "little", "small", "young", "brown", "white", "grey", "curious", "friendly", "clever", "brave",
    "shy", "hungry", "fluffy", "playful", "lazy", "busy", "happy", "lonely",
)  # fmt: skip
PERSON_ADJECTIVES = ("kind", "poor", "young", "clever", "cheerful", "brave", "lonely", "busy")
CREATURE_ADJECTIVES = ("small", "friendly", "green", "shy", "young", "gentle", "silver", "funny")

# Preposition and place; "to" is used for going there.
PLACES = (
    ("in", "forest"), ("in", "park"), ("in", "garden"), ("by", "river"), ("at", "beach"),
    ("on", "hill"), ("by", "lake"), ("at", "farm"), ("in", "meadow"), ("by", "pond"),
    ("in", "field"), ("in", "woods"), ("in", "valley"), ("by", "old mill"), ("by", "old bridge"),
    ("at", "market"), ("in", "village square"), ("on", "mountain"), ("by", "sea"),
    ("in", "orchard"), ("at", "playground"), ("by", "stream"), ("in", "barn"), ("in", "old castle"),
)  # fmt: skip
HOMES = {
    "kid": (
        "in a small house near the forest", "in a little village", "in a big city", "on a farm",
        "by the sea", "in a yellow house on a hill", "next to a quiet lake", "in a busy town",
        "near the mountains", "in a house with a red door", "in a small town",
        "at the edge of the woods",
    ),
    "animal": (
        "in a warm den under an old oak tree", "at the edge of the forest", "near a blue pond",
        "on a sunny farm", "in a quiet meadow", "in a big green garden", "behind an old barn",
        "in the middle of the forest", "by a small stream", "in a cosy nest of leaves",
        "near a little village", "under a wooden bridge",
    ),
    "person": (
        "in a far away land", "in a small village by the sea", "in a little house on a hill",
        "at the foot of a tall mountain", "in a town with crooked streets", "near a deep forest",
        "in a stone house with a round window",
    ),
    "creature": (
        "in a cave behind a waterfall", "at the top of a high mountain", "in an old castle",
        "deep in the forest", "on a small green island", "in a tower with a hundred steps",
        "in a valley where nobody else lived",
    ),
}  # fmt: skip

NOUNS: dict[str, tuple[str, ...]] = {
    "toy": _commas(
        """ball, doll, kite, boat, drum, train, teddy bear, car, puppet, wagon, rocket, bicycle,
        toy horse, puzzle, balloon, bucket, hoop, marble, truck, toy duck, toy rabbit, rope"""
    ),
    "thing": _commas(
        """hat, book, key, cup, lamp, ring, bell, box, map, clock, mirror, coin, basket, blanket,
        ladder, umbrella, coat, scarf, shoe, button, candle, chair, bottle, feather, stone, shell,
        necklace, pencil, picture, whistle, telescope, suitcase, crown, glove, spoon, watch,
        computer, camera, bag, flag, pillow, table, pot, lantern, flute, radio, telephone"""
    ),
    "treasure": _commas(
        """key, coin, ring, shell, stone, feather, bell, box, mirror, button, crown, bottle, map,
        egg, seed, whistle, lantern, necklace, star, pearl, spoon, cup, compass"""
    ),
    "gift": _commas(
        """scarf, hat, book, cake, flower, drum, ball, basket, kite, necklace, picture, blanket,
        lantern, pair of boots, pot of honey, bag of nuts, box of paints, bell, cup, flute"""
    ),
    "treat": _commas(
        """cake, pie, cookie, sandwich, bun, pancake, apple, pear, loaf of bread, bowl of soup,
        jar of honey, bag of nuts, piece of cheese, bowl of berries, melon, carrot, muffin, peach"""
    ),
    "dish": _commas("cake, pie, soup, bread, pudding, jam, stew, pizza, porridge, salad, pancake"),
    "fruit": _commas(
        "apples, pears, berries, plums, cherries, nuts, carrots, grapes, strawberries, beans"
    ),
    "flower": _commas("rose, tulip, daisy, sunflower, lily, poppy, bluebell, violet, buttercup"),
    "plant": _commas(
        "sunflower, bean plant, pumpkin, rose bush, apple tree, tomato plant, melon, tulip"
    ),
    "tree": _commas("oak tree, apple tree, pine tree, willow, cherry tree, birch, chestnut tree"),
    "bug": _commas("butterfly, ladybug, bee, ant, firefly, beetle, grasshopper, dragonfly, moth"),
    "baby": _commas("bird, duckling, squirrel, owl, rabbit, kitten, hedgehog, lamb, fox, mouse"),
    "song": _commas("flute, drum, violin, guitar, trumpet, piano, fiddle, whistle, harp"),
    "craft": _commas("boat, cart, wagon, raft, train, ship, sled, balloon, cart with two wheels"),
    "game": _commas(
        "hide and seek, tag, catch, a counting game, a jumping game, marbles, football"
    ),
    "color": _commas(
        "red, blue, green, yellow, orange, purple, pink, white, black, brown, golden, silver"
    ),
    "number": _commas("two, three, four, five, six, seven, eight, nine, ten, twelve, twenty"),
    "season": _commas("spring, summer, autumn, winter"),
}
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "toy": _commas("red, blue, green, yellow, small, new, shiny, old, little, big, wooden, orange"),
    "thing": _commas("old, big, small, golden, strange, red, blue, green, little, round, heavy"),
    "treasure": _commas("shiny, golden, small, strange, silver, old, little, tiny, blue, bright"),
    "gift": _commas("red, beautiful, small, big, lovely, warm, new, special, little, yellow"),
    "treat": _commas("big, sweet, small, tasty, warm, fresh, round, delicious, little"),
    "dish": _commas("big, hot, sweet, special, delicious"),
    "flower": _commas("red, yellow, small, pretty, tiny, purple, tall, white, pink"),
    "plant": _commas("tall, big, green, beautiful, strong"),
    "tree": _commas("tall, old, big, green, crooked"),
    "bug": _commas("small, tiny, green, yellow, bright, little, blue, busy"),
    "baby": _commas("tiny, little, small, young, cold, frightened"),
    "song": _commas("old, small, wooden, golden, little, shiny"),
    "craft": _commas("small, red, blue, old, wooden, little, yellow, big"),
}
