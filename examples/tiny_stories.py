"""Short stories from word lists and templates: what folio-tiny learned to tell.

A story fixes its cast and props once and then walks through beats: opening, problem, attempt, help, resolution, end.
A beat is a list of alternatives. Fields: {hero} {he} {him} {his} and {He} {His}; the same with an f for the friend.
"""

from random import Random
from typing import NamedTuple

words = str.split  # a list of words is easier to read, and to add to, without quotes and commas

GIRLS = words("""Mia Anna Lily Zoe Nora Ella Ruby Clara Ivy Maya Rosa Sofia Emma Lucy Hana Leila Amina Freya Greta Ines
Julia Kira Lena Maria Nina Olga Paula Rita Sara Tara Uma Vera Wendy Yara Alice Bella Carla Diana Edith Fatima Gina
Heidi Irene Jade Kate Luna Molly Noemi Olivia Priya""")
BOYS = words("""Tom Ben Max Leo Sam Finn Omar Hugo Noah Ivan Jack Luca Marco Nico Oscar Paul Ravi Simon Theo Victor Adam
Bruno Carl David Emil Felix George Henry Isaac Jonas Karl Liam Milo Nils Otto Peter Quinn Robin Stefan Tariq Umar
Walter Yusuf Zane Arthur Boris Diego Erik Frank Gus""")
COLORS = words("red blue green yellow white black brown purple silver golden")
ANIMALS = words("fox rabbit bear mouse hedgehog squirrel otter owl badger cat dog duck frog turtle goat lamb")
PET_NAMES = words("Rusty Pip Biscuit Pepper Willow Hazel Bramble Button Clover Juniper Maple Nutmeg Poppy Acorn")
HOMES = ["a small village by the sea", "a little house near the forest", "a quiet valley between two hills",
         "a town with a tall clock tower", "a cottage beside a slow river", "a farm at the edge of the woods",
         "a narrow street full of flowers", "a white lighthouse on a rock"]  # fmt: skip
TRAITS = words("kind curious brave shy clever cheerful gentle quiet patient careful")
THINGS = ["red kite", "wooden boat", "silver bell", "blue scarf", "small drum", "brass key", "tin whistle",
          "round lantern", "yellow hat", "toy train", "glass marble", "woolly blanket"]  # fmt: skip
SPOTS = ["under the old oak tree", "behind the mill", "beside the pond", "inside an empty barrel",
         "at the top of the hill", "under the wooden bridge", "between two big stones",
         "in the tall grass"]  # fmt: skip
FOODS = ["apple pie", "honey cake", "warm bread", "berry jam", "carrot soup", "oat cookies"]
WEATHER = ["sunny", "windy", "cold", "foggy", "bright", "grey"]
FEARS = ["swim across the pond", "climb the tall tree", "sing in front of others", "walk through the dark woods",
         "cross the shaky bridge", "sleep without a lamp"]  # fmt: skip
SMALL_ONES = ["bird", "butterfly", "kitten", "duckling", "young owl", "baby hedgehog"]

OPENINGS = [
    "Once upon a time there was a {trait} {kind} named {hero}. {He} lived in {home}.",
    "Once upon a time, in {home}, there lived a {trait} {kind} named {hero}.",
    "Once upon a time, a {trait} {kind} named {hero} lived in {home}.",
    "There was once {a_kind} named {hero}, who lived in {home}. Everyone said that {he} was very {trait}.",
    "In {home} lived a {trait} {kind}. {His} name was {hero}.",
    "Long ago, a {trait} {kind} called {hero} lived in {home}.",
]
ENDINGS = [
    "From that day on, {hero} and {friend} were the best of friends.",
    "That night {hero} fell asleep with a smile.",
    "And whenever the wind was {weather2}, {hero} thought of that day and smiled.",
    "{hero} never forgot that day, and neither did {friend}.",
    "And so the day ended well for {hero}, for {friend}, and for everyone in the neighbourhood.",
    '"What a day!" said {hero}. "Yes," said {friend}, "let us do it again tomorrow."',
    "They walked home together under the stars, and {hero} was happy.",
]
PLOTS: dict[str, list[list[str]]] = {
    "lost": [
        ["The thing {hero} loved most was {his} {thing}.", "{hero} had a {thing}, and {he} took it everywhere."],
        ["One {weather} morning, the {thing} was gone.", "But one {weather} day, {he} could not find the {thing}.",
         "Then, on a {weather} afternoon, {he} looked up and saw that the {thing} was missing."],
        ["{He} looked under the bed and behind the door, but it was not there.", "{He} searched every corner. Nothing.",
         "{He} turned the whole house upside down and found only dust."],
        ["{hero} sat down and began to cry.", "{hero} felt very sad.", "{hero} did not know what to do."],
        ["Just then {his} friend {friend2} came by. \"Do not worry,\" said {friend}. \"We will look together.\"",
         ("{hero} went to see {his} friend {friend2}. \"I have lost my {thing},\" {he} said. "
          "\"Then let us find it,\" said {friend}.")],
        ["They followed the path and looked everywhere.", "They asked everyone they met along the way.",
         "\"Where did you last have it?\" asked {friend}. {hero} thought hard."],
        ["At last they saw something {spot}. It was the {thing}!", "And there, {spot}, lay the {thing}.",
         "\"Look!\" cried {friend}. The {thing} was {spot}."],
        ["{hero} hugged {friend} and said, \"Thank you. Two find more than one.\"",
         "\"Thank you,\" said {hero}. {He} let {friend} hold the {thing} all the way home."],
    ],
    "afraid": [
        ["There was one thing that {hero} did not dare: to {fear}.", "{hero} had a secret. {He} was afraid to {fear}."],
        ["All the others could do it, and {he} only watched.", "Every day {he} tried, and every day {he} turned back."],
        ["One {weather} day, {his} friend {friend2} asked, \"Why do you look so sad?\"",
         "One {weather} evening, {hero} told {his} friend {friend2} about it."],
        ["\"I want to {fear},\" said {hero}, \"but my knees shake.\"", "\"I am too small for it,\" said {hero}."],
        ["{friend} did not laugh. \"I was afraid too,\" {fhe} said. \"Try one little step, and I will stay with you.\"",
         "\"Being brave does not mean that your knees are still,\" said {friend}. \"Take my hand.\""],
        ["So {hero} took a deep breath and began.", "{hero} counted to three. One, two, three!"],
        ["First it was hard. Then it was a little easier. And then, suddenly, it was done!",
         "{His} heart was beating like a drum, but {he} did not stop, and soon {he} had done it."],
        ["\"I did it!\" shouted {hero}. {friend} clapped and danced.",
         "{hero} laughed out loud. \"It was not so bad,\" {he} said, \"with you at my side.\""],
    ],
    "rescue": [
        ["One {weather} morning, {hero} went for a walk.",
         "On a {weather} day, {hero} was on {his} way to the market."],
        ["{spot_cap}, {he} heard a tiny voice. It was a {small} that could not get home.",
         "Then {he} heard a soft cry. A {small} was sitting {spot}, cold and alone."],
        ["\"Poor thing,\" said {hero}. {He} gave it water and kept it warm with {his} coat.",
         "{hero} knelt down. \"I will help you,\" {he} whispered."],
        ["But {hero} did not know the way to its home, so {he} ran to {his} friend {friend2}.",
         "{He} carried the {small} to {his} friend {friend2}, who knew a lot about such things."],
        ["\"It needs rest and a little food,\" said {friend}. They made a soft bed out of leaves.",
         "{friend} looked at it and said, \"It is only tired. Let us take care of it together.\""],
        ["For three days they took turns and watched over it.", "Day after day, the {small} grew stronger."],
        ["At last the {small} was well again. It looked back once and went home.",
         "Then one morning it was strong enough, and its mother came to fetch it."],
        ["{hero} was a little sad and very proud.", "\"We will miss it,\" said {friend}. {hero} nodded and waved."],
    ],
    "baking": [
        ["One {weather} day, {hero} wanted to make {food} for {his} friend {friend2}.",
         "It was the birthday of {his} friend {friend2}, and {hero} wanted to bring {food}."],
        ["{He} put everything on the table and began to stir.", "{He} tied on an apron and set to work."],
        ["But {he} took salt in place of sugar, and it tasted terrible!",
         "But {he} forgot the time, and soon the whole kitchen was full of smoke.",
         "But the bowl slipped from {his} hands and everything fell on the floor."],
        ["\"Oh no,\" said {hero}, \"now I have nothing to give.\"", "{hero} looked at the mess and wanted to hide."],
        ["There was a knock at the door. It was {friend}. {fHe} saw the mess and smiled.",
         "Then {friend} looked in through the window. \"May I help?\" {fhe} asked."],
        ["\"The best part is to make it together,\" said {friend}, and {fhe} rolled up {fhis} sleeves.",
         "\"Everyone makes mistakes,\" said {friend}. \"Let us start again, the two of us.\""],
        ["{hero} stirred and {friend} tasted, and soon the {food} smelled wonderful.",
         "They worked and laughed, and in an hour the {food} was ready."],
        ["They ate it all, down to the last bit.", "It was the best {food} that they had ever had."],
    ],
    "sharing": [
        ["One {weather} day, {hero} had nothing to eat but one small plate of {food}.",
         "It was a hard winter, and {hero} had only a little {food} left."],
        ["{He} was just about to begin when {he} heard a knock.", "{He} sat down to eat. Then someone called outside."],
        ["It was {his} neighbour {friend2}. \"I am so hungry,\" said {friend}.",
         "At the door stood {friend2}, wet and tired. \"Do you have something to eat?\" {fhe} asked."],
        ["{hero} looked at the {food}. It was not much. But {he} cut it in two.",
         "{hero} thought for a moment. Then {he} said, \"Come in. Half of it is yours.\""],
        ["They ate slowly and told each other stories.", "It was little, but it tasted good because they were two."],
        ["The next morning, {hero} found a basket in front of the door, full of good things.",
         "A week later, {friend} came back with a {thing} and a big basket of fruit."],
        ["\"You gave me half of what you had,\" said {friend}. \"Now I give you half of mine.\"",
         "A note was on it: \"For {hero}, who shares. From {friend}.\""],
    ],
    "map": [
        ["One {weather} day, {hero} found an old map {spot}.",
         "One {weather} day, {hero} opened an old book, and a map fell out."],
        ["There was a cross on it, drawn in {color} ink.",
         "On the map there was a {color} line, and at its end a cross."],
        ["{hero} ran to {his} friend {friend2}. \"A treasure!\" {he} cried. \"Will you come with me?\"",
         "\"Shall we go and look?\" {he} asked {his} friend {friend2}. \"At once!\" said {friend}."],
        ["They walked past the mill and over the bridge.", "They went through the woods and along the river."],
        ["But then the path ended at a deep stream. \"We must go back,\" said {hero}.",
         "But soon a thick fog came up, and {hero} could not see the path any more."],
        ["\"Wait,\" said {friend}. {fHe} had an idea, and a few minutes later they were safely on the other side.",
         "\"Hold my hand,\" said {friend}. \"Step by step we will get there.\" And so they did."],
        ["At the cross they dug a hole and found a box. Inside was a {thing}.",
         "There, just where the cross was, stood a little chest. In it lay a {thing}."],
        ["\"It is not gold,\" said {friend}. \"It is better,\" said {hero}. \"We found it together.\"",
         "They agreed that {hero} would have it on some days and {friend} on the others."],
    ],
    "garden": [
        ["In spring, {hero} put a seed into the ground {spot}.",
         "One {weather} day, {hero} got a seed from {his} friend {friend2}."],
        ["Every morning {he} gave it water.", "{He} watered it every day and sang to it."],
        ["But nothing happened. A week went by, and then another.", "But the earth stayed bare and brown."],
        ["\"It will never grow,\" said {hero}. {He} wanted to throw down the watering can.",
         "\"I must have done something wrong,\" {hero} said sadly."],
        ["\"Give it time,\" said {friend}. \"Good things are slow.\"",
         "{friend} looked at the ground and said, \"Under the earth it is already working. Wait a little.\""],
        ["So {hero} waited through rain and sun.", "So {he} went on, morning after morning."],
        ["And one day there was a tiny green leaf! By summer it was a flower, {color} and tall.",
         "Then, after a warm night, a green tip was there. It grew and grew, and it bore a {color} flower."],
        ["\"You were right,\" said {hero} to {friend}. {He} gave {fhim} the first seed of the new flower.",
         "{hero} called {friend}, and together they looked at it until the sun went down."],
    ],
    "quarrel": [
        ["{hero} and {his} friend {friend2} played together every day.", "{hero} had a good friend, {friend2}."],
        ["One {weather} day, they both wanted the {thing}.", "One {weather} day, they found a {thing} {spot}."],
        ["\"It is mine!\" said {hero}. \"No, mine!\" said {friend}.",
         "\"I saw it first!\" cried {friend}. \"No, I did!\" cried {hero}."],
        ["They pulled, and the {thing} broke in two.", "They shouted until both of them went home angry."],
        ["The next day was long and empty. {hero} had nobody to play with.",
         "That evening, {hero} sat alone by the window. It was very quiet."],
        ["\"A friend is worth more than a {thing},\" {he} thought, and {he} went to find {friend}.",
         "{He} took a deep breath and went to the house of {friend}."],
        ["\"I am sorry,\" said {hero}. \"I am sorry too,\" said {friend}.",
         "{friend} was already on the way to {him}. \"I am sorry,\" they both said at once, and then they laughed."],
        ["They mended it together, and it was as good as new.",
         "After that they took turns, and there was enough time for both."],
    ],
    "race": [
        ["Every year there was a great race in the neighbourhood.",
         "One {weather} day, there was a race around the lake."],
        ["{hero} had trained for many weeks, and so had {his} friend {friend2}.",
         "{hero} wanted to win. But {friend2} was very fast."],
        ["\"Ready, steady, go!\" And off they ran.", "The bell rang, and everyone began to run."],
        ["Soon {hero} was in front. {He} could already see the end.",
         "Halfway, {hero} was first, and {his} heart was light."],
        ["Then {he} heard a cry. {friend} had fallen {spot}.",
         "But behind {him}, {friend} slipped and hurt {fhis} foot."],
        ["{hero} stopped. The others ran past, but {he} turned around.", "{hero} did not think twice. {He} ran back."],
        ["\"Lean on me,\" {he} said, and slowly they went on together.",
         "{He} helped {friend} up, and arm in arm they went on."],
        ["They came in last, but everybody cheered for them the loudest.",
         "They were the last, and still they got a prize: a {thing} for the best friends."],
    ],
}  # fmt: skip
PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "him", "his")}


def invented(rng: Random) -> str:
    """A pronounceable word that is in no list: Talo, Brimen, Kusarel."""
    onset = words("b d f g h j k l m n p r s t v w z br dr gr kl tr st")
    word = "".join(rng.choice(onset) + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return (word + rng.choice(["", "n", "r", "l", "s"])).capitalize()


class Cast(NamedTuple):
    """Who a story is about. `kind` is girl, boy or an animal; `sex` picks the pronouns."""

    name: str
    kind: str
    sex: str


def a_character(rng: Random) -> Cast:
    sex = rng.choice("fm")
    if rng.random() < 0.5:
        name = invented(rng) if rng.random() < 0.1 else rng.choice(GIRLS if sex == "f" else BOYS)
        return Cast(name, "girl" if sex == "f" else "boy", sex)
    return Cast(rng.choice(PET_NAMES) if rng.random() < 0.9 else invented(rng), rng.choice(ANIMALS), sex)


def story(rng: Random, hero: Cast | None = None, thing: str | None = None, plot: str | None = None) -> str:
    """One story, beat by beat. Cast and props are fixed first, so names, pronouns and objects agree throughout."""
    hero = hero or a_character(rng)
    friend = draw_other(rng, hero)
    field = {"hero": hero.name, "kind": hero.kind, "friend": friend.name, "thing": thing or rng.choice(THINGS)}
    field["a_kind"] = ("an " if hero.kind[0] in "aeiou" else "a ") + hero.kind
    field["friend2"] = friend.name if friend.kind in ("girl", "boy") else f"{friend.name} the {friend.kind}"
    for prefix, who in (("", hero), ("f", friend)):
        for key, word in zip(("he", "him", "his"), PRONOUNS[who.sex], strict=True):
            field[prefix + key], field[prefix + key.capitalize()] = word, word.capitalize()
    lists = {"home": HOMES, "trait": TRAITS, "spot": SPOTS, "food": FOODS, "weather": WEATHER, "weather2": WEATHER,
             "fear": FEARS, "small": SMALL_ONES, "color": COLORS}  # fmt: skip
    field |= {key: rng.choice(words) for key, words in lists.items()}
    field["spot_cap"] = field["spot"][0].upper() + field["spot"][1:]
    beats = [OPENINGS, *PLOTS[plot or rng.choice(list(PLOTS))], ENDINGS]
    sentences = [rng.choice(beat).format_map(field) for beat in beats]
    cut = len(sentences) - rng.randint(3, 4)  # two paragraphs and a closing line
    return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])


def draw_other(rng: Random, hero: Cast) -> Cast:
    while (other := a_character(rng)).name == hero.name:
        pass
    return other
