"""The text that folio-tiny learns from: a seeded generator of stories, chats, sums and few-shot sheets.

    python -m examples.tiny_corpus            # print one document of every kind
    python -m examples.tiny_corpus 7 --long   # other seed, long documents

A bundled model must come from data that anybody may copy, so nothing here is taken from elsewhere: every document is
grown from the word lists and templates in this file and in `tiny_stories.py`. Two rules shape it.

* **Held-out facts.** `held_out(...)` hashes a fact, such as a (name, city) pair, an unordered pair of summands or a
  tool's arguments, and keeps a tenth of all facts away from training. Training documents are drawn with `held=False`,
  `eval_items` with `held=True`: the same code makes both, so the two never drift apart and never overlap.
* **Copy, do not memorise.** A quarter of the names and cities are invented on the spot from syllables. A model that
  has to answer with a name it never saw learns to copy from its context, which is what serves a user's own sentence.

A document is a plain string (completion form, ends with end-of-text) or a `Chat` (rendered by the chat template).
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, NamedTuple

from examples.tiny_stories import BOYS, COLORS, GIRLS, THINGS, TRAITS, a_character, invented, story, words

CITIES = """Oslo,Paris,Rome,Berlin,Madrid,Lisbon,Vienna,Prague,Dublin,London,Tokyo,Kyoto,Cairo,Lima,Quito,Delhi,Mumbai,
Seoul,Sydney,Toronto,Boston,Chicago,Denver,Dallas,Miami,Seattle,New York,San Diego,Mexico City,Bogota,Santiago,
Nairobi,Accra,Lagos,Tunis,Athens,Sofia,Warsaw,Kraków,Zürich,Geneva,Basel,Milan,Turin,Naples,Venice,Porto,Málaga,
Seville,Bilbao,Lyon,Nice,Lille,Hamburg,Munich,Cologne,Bremen,Leipzig,Dresden,Helsinki,Tampere,Stockholm,Malmö,
Bergen,Aarhus,Riga,Vilnius,Tallinn,Kyiv,Odessa,Ankara,Izmir,Tbilisi,Baku,Tehran,Doha,Dubai,Hanoi,Manila,Jakarta,
Bangkok,Perth,Auckland,Wellington,Ottawa,Montreal,Calgary,São Paulo,Recife,Havana""".replace("\n", "").split(",")
ITEMS = words("bag cup hat lamp chair book kite ball clock scarf pen table coat vase bike drum mug rug box shirt")
ROOMS = ["kitchen", "bedroom", "bathroom", "garage", "hall", "office", "attic", "living room"]
LANGUAGES = words("French German Spanish Italian Polish Finnish Korean Turkish Greek Danish")
WORDS = words("apple bread river house cloud friend garden window winter music water horse forest letter moon flower")
TOPICS = words("whales trains castles stars volcanoes bees ships dragons robots maps birds chess painting rivers")
GENRES = words("jazz rock folk pop opera blues techno country")
NOTES = ["I am late", "see you soon", "happy birthday", "call me", "dinner is ready", "good luck"]
CHORES = ["water the plants", "call grandma", "buy milk", "feed the cat", "wash the car", "close the window",
          "pay the rent", "clean the desk", "post the letter", "walk the dog"]  # fmt: skip


def held_out(*fact: Any) -> bool:
    """True for the tenth of all facts that training never sees. Stable across runs, machines and Python versions."""
    return zlib.crc32("|".join(map(str, fact)).encode()) % 10 == 0


def draw(make: Callable[[], Any], fact: Callable[[Any], tuple], held: bool) -> Any:
    """Call `make` until what it made lies on the wanted side of the held-out split."""
    while True:
        made = make()
        if held_out(*fact(made)) == held:
            return made


def a_name(rng: Random) -> str:
    return invented(rng) if rng.random() < 0.25 else rng.choice(GIRLS + BOYS)


def a_city(rng: Random) -> str:
    return invented(rng) if rng.random() < 0.25 else rng.choice(CITIES)


def a_person(rng: Random, held: bool = False) -> dict[str, Any]:
    """One {"name", "age", "city"} whose (name, city) pair is on the wanted side of the split."""

    def make() -> dict[str, Any]:
        return {"name": a_name(rng), "age": rng.randint(1, 99), "city": a_city(rng)}

    return draw(make, lambda person: (person["name"], person["city"]), held)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------- single turns


class Turn(NamedTuple):
    """One question and its answer. `answer` is the text to be said, or {"name", "arguments"} for a tool call."""

    user: str
    answer: Any
    system: str | None = None
    expect: Any = None  # what an evaluation compares with, where it is not the answer itself


@dataclass
class Chat:
    """A conversation in the OpenAI message form, with its tools, if any."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


SENTENCES = [
    "{name} is {age} years old and lives in {city}.", "{name} lives in {city} and is {age} years old.",
    "{name}, {age}, lives in {city}.", "{name} ({age}) is from {city}.",
    "My name is {name}. I am {age} and I live in {city}.",
    "In {city} lives {name}, who is {age} years old.", "This is {name} from {city}, aged {age}.",
    "{name} is {age}. Home is {city}.", "I am {name} from {city}, and I am {age} years old.",
    "{name}, who is {age}, has a house in {city}.", "At the age of {age}, {name} moved to {city}.",
    "{name} turned {age} last week and still lives in {city}.",
    "Hello, I am {name}, {age} years old, and I live in {city}.",
    "{age}-year-old {name} lives in {city}.", "Meet {name}, a teacher of {age} who works in {city}.",
    "The city of {city} is the home of {name}, who is {age}.", "{name} from {city} is {age}.",
]  # fmt: skip
EXTRACT_ASKS = [
    "Extract the {keys} as JSON: {text}", "Extract {keys} as JSON.\n{text}", "{text}\nGive me the {keys} as JSON.",
    "Turn this into JSON with {keys}: {text}", "Write the {keys} as a JSON object.\n\n{text}",
    "JSON with {keys}, please: {text}",
    "Read the sentence and answer with JSON ({keys}).\n{text}", "Sentence: {text}\nReturn JSON with the keys {keys}.",
    "What are the {keys}? Answer in JSON. {text}",
]  # fmt: skip
EXTRACT_SHORT = ["Extract JSON: {text}", "As JSON: {text}", "{text}\nJSON:", "Extract the person as JSON: {text}",
                 "To JSON: {text}"]  # fmt: skip
EXTRACT_SYSTEMS = [
    "You extract name, age and city as JSON.", "Answer only with JSON: name, age, city.",
    "You turn sentences into JSON with the keys name, age and city.", "Extract the person in each message as JSON.",
]  # fmt: skip


def spoken(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def extraction(rng: Random, held: bool = False) -> Turn:
    """Name, age and city out of a sentence; the system prompt or the message says so, or both."""
    person = a_person(rng, held)
    text = rng.choice(SENTENCES).format_map(person)
    style = rng.random()
    if style < 0.25:
        return Turn(text, to_json(person), rng.choice(EXTRACT_SYSTEMS), person)
    system = rng.choice([*EXTRACT_SYSTEMS, "You are a helpful assistant."]) if style < 0.45 else None
    ask = rng.choice(EXTRACT_SHORT if rng.random() < 0.3 else EXTRACT_ASKS)
    return Turn(ask.format(keys="name, age and city", text=text), to_json(person), system, person)


def extraction_variant(rng: Random) -> Turn:
    """Training only: some keys, several people, or another schema, so that the keys are read and not only recited."""
    style = rng.random()
    if style < 0.4:
        person = a_person(rng)
        keys = rng.sample(["name", "age", "city"], rng.randint(1, 2))
        answer, text = {key: person[key] for key in keys}, rng.choice(SENTENCES).format_map(person)
    elif style < 0.6:
        answer = [a_person(rng) for _ in range(rng.randint(2, 3))]
        text = " ".join(rng.choice(SENTENCES).format_map(person) for person in answer)
        return Turn("Extract a JSON list of all people: " + text, to_json(answer))
    else:
        answer = {"item": rng.choice(ITEMS), "color": rng.choice(COLORS), "price": rng.randint(1, 99)}
        text = rng.choice(["The {color} {item} costs {price} dollars.", "I paid {price} dollars for a {color} {item}.",
                           "For {price} dollars you get the {color} {item}."]).format_map(answer)  # fmt: skip
        keys = list(answer)
    return Turn(rng.choice(EXTRACT_ASKS).format(keys=spoken(keys), text=text), to_json(answer))


SUM_ASKS = ["What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "What is the sum of {a} and {b}?", "{a} plus {b}?",
            "How much is {a} + {b}?", "{a}+{b}", "Calculate {a} + {b}."]  # fmt: skip


def a_sum(rng: Random, held: bool = False, below: int = 100) -> tuple[int, int]:
    """Two numbers, the second below `below`. The split is on the unordered pair, so a + b does not give b + a away."""
    return draw(lambda: (rng.randrange(100), rng.randrange(below)), lambda pair: ("sum", min(pair), max(pair)), held)


def addition(rng: Random, held: bool = False) -> Turn:
    a, b = a_sum(rng, held)
    return Turn(rng.choice(SUM_ASKS).format(a=a, b=b), str(a + b), expect=a + b)


SMALL_TALK = [
    (["Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning", "Hi there", "Good evening!"],
     ["Hello! How can I help you?", "Hi! What can I do for you?"]),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself."],
     ["I am Folio-tiny, a very small language model that comes with Folio."]),
    (["What can you do?", "How can you help me?", "Help", "What are you good at?"],
     ["I can tell short stories, turn sentences into JSON, call tools and add small numbers."]),
    (["Thanks", "Thank you", "Thank you!", "Thanks a lot!"], ["You are welcome!", "My pleasure."]),
    (["Bye", "Goodbye", "See you later!", "Good night"], ["Goodbye!", "See you soon!"]),
    (["How are you?", "How are you today?", "Are you well?"], ["I am fine, thank you. How can I help you?"]),
    (["Who made you?", "Where do you come from?"],
     ["I was trained from scratch for the Folio project, in about an hour on two CPU cores."]),
    (["How big are you?", "Are you a large model?"], ["No, I am tiny: fewer than three million parameters."]),
    (["Are you human?", "Are you a robot?", "Are you alive?"], ["No, I am a small language model."]),
    (["What is Folio?", "Tell me about Folio."], ["Folio is a small LLM serving engine in pure PyTorch."]),
    (["Tell me a joke.", "Do you know a joke?"],
     ["Why did the token cross the page? To get to the other cache.",
      "I would tell you a long joke, but my context is short."]),
    (["What is the meaning of life?", "Can you write a novel?", "Who will win the election?", "Explain gravity.",
      "What is love?", "Write code for me."],
     ["I am too small to know that. But I can tell you a story.", "That is too hard for me. I am only a tiny model."]),
    (["You are great!", "Well done!", "Good job"], ["Thank you! That makes me happy."]),
    (["OK", "I see", "Nice", "Cool"], ["Is there anything else I can do for you?"]),
]  # fmt: skip


def small_talk(rng: Random) -> Turn:
    asks, answers = rng.choice(SMALL_TALK)
    return Turn(rng.choice(asks), rng.choice(answers))


def story_turn(rng: Random) -> Turn:
    hero, thing, plot = a_character(rng), rng.choice(THINGS), "lost"
    article = "an" if hero.kind[0] in "aeiou" else "a"
    ask = rng.choice(["Tell me a story{about}.", "Tell me a short story{about}.", "Write a story{about}.",
                      "Can you tell me a story{about}?", "Please tell me a story{about}."])  # fmt: skip
    style = rng.randrange(4)
    if style == 0:
        return Turn(ask.format(about=""), story(rng))
    if style == 1:
        return Turn(ask.format(about=f" about {article} {hero.kind}"), story(rng, hero))
    about = f" about {article} {hero.kind} named {hero.name}"
    if style == 2:
        return Turn(ask.format(about=about), story(rng, hero))
    return Turn(ask.format(about=f"{about} and a {thing}"), story(rng, hero, thing, plot))


# -------------------------------------------------------------------------------------------------------------- tools


class Tool(NamedTuple):
    """A tool that training knows: what it says of itself, how people ask for it, and what its result reads like."""

    description: str
    arguments: dict[str, Callable[[Random], Any]]
    asks: list[str]
    result: Callable[[Random], dict[str, Any]]
    reply: str


def a_time(rng: Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}"


def one_of(words: list[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(words)


def number(low: int, high: int) -> Callable[[Random], int]:
    return lambda rng: rng.randint(low, high)


def done(rng: Random) -> dict[str, Any]:
    return {"status": "ok"}


TOOLS = {
    "get_weather": Tool(
        "Weather in a city", {"city": a_city},
        ["What is the weather in {city}?", "How is the weather in {city} today?", "Is it raining in {city}?",
         "Weather in {city}, please."],
        lambda rng: {"sky": rng.choice(["sunny", "cloudy", "rainy"]), "degrees": rng.randint(1, 35)},
        "It is {sky} in {city}, with {degrees} degrees."),
    "get_time": Tool(
        "Local time in a city", {"city": a_city},
        ["What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"],
        lambda rng: {"time": a_time(rng)}, "It is {time} in {city}."),
    "set_timer": Tool(
        "Start a timer", {"minutes": number(1, 90)},
        ["Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Start a timer of {minutes} minutes."],
        done, "The timer is set for {minutes} minutes."),
    "set_light": Tool(
        "Set the light of a room", {"room": one_of(ROOMS), "percent": number(1, 100)},
        ["Set the light in the {room} to {percent} percent.", "I need {percent} percent light in the {room}.",
         "Light in the {room}: {percent} percent, please."],
        done, "The light in the {room} is at {percent} percent."),
    "set_heating": Tool(
        "Set the heating of a room", {"room": one_of(ROOMS), "degrees": number(10, 29)},
        ["Set the {room} to {degrees} degrees.", "Heat the {room} to {degrees} degrees.",
         "I want {degrees} degrees in the {room}."],
        done, "The {room} is set to {degrees} degrees."),
    "send_message": Tool(
        "Send a text to a person", {"to": a_name, "text": one_of(NOTES)},
        ["Send {to} a message: {text}.", "Tell {to}: {text}.", "Write to {to}: {text}."],
        done, "I have sent the message to {to}."),
    "call_person": Tool(
        "Make a phone call", {"name": a_name},
        ["Call {name}.", "Please phone {name}.", "I want to talk to {name} on the phone."],
        done, "I am calling {name}."),
    "translate": Tool(
        "Translate a word", {"word": one_of(WORDS), "language": one_of(LANGUAGES)},
        ["Translate {word} into {language}.", "What is {word} in {language}?", "How do you say {word} in {language}?"],
        lambda rng: {"translation": invented(rng).lower()}, "{word} in {language} is {translation}."),
    "search_books": Tool(
        "Find books about a topic", {"topic": one_of(TOPICS)},
        ["Find books about {topic}.", "I want to read about {topic}.", "Do you have a book on {topic}?"],
        lambda rng: {"found": rng.randint(1, 20)}, "I found {found} books about {topic}."),
    "book_table": Tool(
        "Book a table in a restaurant", {"people": number(1, 12), "time": a_time},
        ["Book a table for {people} at {time}.", "A table for {people} people at {time}, please.",
         "At {time} we want to eat out. We are {people}."],
        done, "Your table for {people} is booked for {time}."),
    "buy_item": Tool(
        "Buy things in the shop", {"item": one_of(ITEMS), "color": one_of(COLORS), "count": number(1, 20)},
        ["Buy {count} of the {color} {item}.", "Order {count} times the {color} {item}.",
         "I need {count} pieces of the {color} {item}."],
        done, "I have ordered {count} of the {color} {item}."),
    "add_reminder": Tool(
        "Remind the user of something", {"task": one_of(CHORES), "time": a_time},
        ["Remind me at {time} to {task}.", "At {time}, remind me to {task}.", "I have to {task} at {time}. Remind me."],
        done, "I will remind you at {time} to {task}."),
    "book_train": Tool(
        "Buy a train ticket", {"start": a_city, "goal": a_city},
        ["I need a train from {start} to {goal}.", "Book a train ticket from {start} to {goal}.",
         "Take me by train to {goal}. I start in {start}."],
        lambda rng: {"price": rng.randint(10, 99)}, "Your ticket from {start} to {goal} costs {price}."),
    "play_music": Tool(
        "Play a kind of music", {"genre": one_of(GENRES), "minutes": number(5, 90)},
        ["Play {minutes} minutes of {genre}.", "I want to hear {genre} music for {minutes} minutes.",
         "Put on {genre} for {minutes} minutes, please."],
        done, "Enjoy {minutes} minutes of {genre}."),
}  # fmt: skip
NO_TOOL = ["Sorry, I have no tool for that.", "I do not have a tool that can do that."]


def tool_spec(name: str) -> dict[str, Any]:
    """The tool in the OpenAI form, as a client would send it."""
    tool, rng = TOOLS[name], Random(0)
    kinds = {key: "integer" if isinstance(make(rng), int) else "string" for key, make in tool.arguments.items()}
    parameters = {"type": "object", "properties": {k: {"type": t} for k, t in kinds.items()}, "required": list(kinds)}
    return {"type": "function", "function": {"name": name, "description": tool.description, "parameters": parameters}}


TOOL_SPECS = {name: tool_spec(name) for name in TOOLS}


def tool_turn(rng: Random, offered: list[str], held: bool = False) -> Turn:
    """A request for one of the offered tools; the answer is the call."""
    name = rng.choice(offered)
    tool = TOOLS[name]

    def make() -> dict[str, Any]:
        return {key: make_one(rng) for key, make_one in tool.arguments.items()}

    arguments = draw(make, lambda made: (name, *made.values()), held)
    call = {"name": name, "arguments": arguments}
    return Turn(rng.choice(tool.asks).format_map(arguments), call, expect=call)


def no_tool_turn(rng: Random, offered: list[str]) -> Turn:
    """A request that no offered tool fits: a missing tool, or something that needs none."""
    if rng.random() < 0.5:
        return small_talk(rng) if rng.random() < 0.5 else addition(rng)
    wanted = tool_turn(rng, [name for name in TOOLS if name not in offered])
    return Turn(wanted.user, rng.choice(NO_TOOL))


def offer(rng: Random, low: int = 1) -> list[str]:
    return rng.sample(list(TOOLS), rng.randint(low, 6))


# -------------------------------------------------------------------------------------------- chats and long documents


def said(turn: Turn) -> list[dict[str, Any]]:
    """A turn as two messages; a tool call takes the form that the chat template and the OpenAI API know."""
    answer: dict[str, Any] = {"role": "assistant", "content": turn.answer}
    if isinstance(turn.answer, dict):
        answer |= {"content": "", "tool_calls": [{"type": "function", "function": turn.answer}]}
    return [{"role": "user", "content": turn.user}, answer]


def single_chat(rng: Random, turn: Turn) -> Chat:
    system = turn.system or rng.choice([None, None, None, "You are a helpful assistant."])
    return Chat(([{"role": "system", "content": system}] if system else []) + said(turn))


def tool_chat(rng: Random) -> Chat:
    """One request with tools on offer; now and then the tool answers and the model tells the user."""
    offered = offer(rng)
    specs = [TOOL_SPECS[name] for name in offered]
    if rng.random() < 0.2:
        chat = single_chat(rng, no_tool_turn(rng, offered))
        return Chat(chat.messages, specs)
    turn = tool_turn(rng, offered)
    messages = single_chat(rng, turn).messages
    if rng.random() < 0.3:
        messages += tool_result(rng, turn)
    return Chat(messages, specs)


def tool_result(rng: Random, turn: Turn) -> list[dict[str, Any]]:
    tool = TOOLS[turn.answer["name"]]
    result = tool.result(rng)
    reply = tool.reply.format_map(turn.answer["arguments"] | result)
    return [{"role": "tool", "content": to_json(result)}, {"role": "assistant", "content": reply}]


def memory_turns(rng: Random) -> tuple[Turn, Turn]:
    """Something the user says of themselves, and a question about it that comes later."""
    name, age, city = a_person(rng).values()
    return rng.choice([
        (Turn(f"My name is {name}.", f"Nice to meet you, {name}!"), Turn("What is my name?", f"Your name is {name}.")),
        (Turn(f"I live in {city}.", f"{city} is a nice place."), Turn("Where do I live?", f"You live in {city}.")),
        (Turn(f"I am {age} years old.", "Good to know."), Turn("How old am I?", f"You are {age} years old.")),
    ])  # fmt: skip


def mixed_chat(rng: Random, turns: int) -> Chat:
    """Many turns of all sorts, tools on offer in some chats, and something to remember from early to late."""
    offered = offer(rng, 2) if rng.random() < 0.4 else []
    early, late = memory_turns(rng)
    at = sorted(rng.sample(range(turns), 2)) if turns >= 3 else [-1, -1]
    messages: list[dict[str, Any]] = []
    for i in range(turns):
        if i in at:
            messages += said(early if i == at[0] else late)
        elif offered and rng.random() < 0.5:
            turn = tool_turn(rng, offered)
            messages += said(turn) + (tool_result(rng, turn) if rng.random() < 0.5 else [])
        else:
            messages += said(rng.choice(MIXED)(rng))
    return Chat(messages, [TOOL_SPECS[name] for name in offered] or None)


def extraction_asked(rng: Random) -> Turn:
    while (turn := extraction(rng)).system:
        pass
    return turn


def people(rng: Random, count: int) -> list[dict[str, Any]]:
    """Persons with different names, so that a question about one of them has one answer."""
    return list({person["name"]: person for person in (a_person(rng) for _ in range(count))}.values())


def few_facts(rng: Random) -> Turn:
    return facts_turn(rng, rng.randint(1, 5))


MIXED = [small_talk, addition, addition, extraction_asked, few_facts, extraction_variant]
FACT_ASKS = [
    ("How old is {name}?", "{name} is {age} years old."), ("Where does {name} live?", "{name} lives in {city}."),
    ("What is {name}'s age?", "{age}"), ("Which city does {name} live in?", "{city}"),
]  # fmt: skip


def facts_turn(rng: Random, count: int) -> Turn:
    """Facts about some people, then a question about one of them."""
    known = people(rng, count)
    text = " ".join(rng.choice(SENTENCES[:4]).format_map(person) for person in known)
    person = rng.choice(known)
    ask, answer = rng.choice(FACT_ASKS)
    return Turn(f"{text}\n{ask.format_map(person)}", answer.format_map(person))


ECHO_ASKS = ["Repeat: {text}", "Say: {text}", "Repeat after me: {text}", "{text}\nRepeat that.", "Echo this: {text}"]


def echo_turn(rng: Random, count: int) -> Turn:
    """Say it again. Useless to a user and dear to the model: every token of the answer is a lesson in copying."""
    makers = [a_name, a_name, a_city, lambda rng: str(rng.randrange(100)), lambda rng: rng.choice(WORDS)]
    text = rng.choice([" ", ", ", "-"]).join(rng.choice(makers)(rng) for _ in range(count))
    return Turn(rng.choice(ECHO_ASKS).format(text=text), text)


SHEETS = [("Sentence: ", "JSON: "), ("Input: ", "Output: "), ("Text: ", "JSON: "), ("Q: ", "A: ")]


def few_shot(rng: Random, shots: int, held: bool = False) -> tuple[str, dict[str, Any]]:
    """A sheet of solved extractions in completion form. Returns it up to the last answer, and that answer."""
    ask, reply = rng.choice(SHEETS)
    keep = rng.choice(SENTENCES) if rng.random() < 0.3 else None  # some sheets use one phrasing throughout
    lines = ["Turn each sentence into JSON.\n\n" if rng.random() < 0.3 else ""]
    for i in range(shots + 1):
        person = a_person(rng, held and i == shots)
        lines.append(f"{ask}{(keep or rng.choice(SENTENCES)).format_map(person)}\n{reply}")
        if i < shots:
            lines.append(to_json(person) + "\n\n")
    return "".join(lines).rstrip(" "), person


def few_shot_sheet(rng: Random, shots: int) -> str:
    prompt, answer = few_shot(rng, shots)
    return f"{prompt} {to_json(answer)}"


def sum_sheet(rng: Random, count: int, below: int = 100) -> str:
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in (a_sum(rng, below=below) for _ in range(count)))


# Shares of the documents (not of the tokens), in the early and in the late part of training, among short documents and
# among long ones. Sums are the last skill to come, so the late part has about three times as many.
SHARES = {
    #              early: short, long  late: short, long
    "story":              (0.11, 0.10, 0.09, 0.08),
    "story_chat":         (0.05, 0.02, 0.05, 0.02),
    "extraction":         (0.22, 0.08, 0.16, 0.06),
    "extraction_variant": (0.06, 0.02, 0.06, 0.02),
    "tool":               (0.18, 0.10, 0.17, 0.10),
    "addition":           (0.08, 0.04, 0.16, 0.08),
    "sum_sheet":          (0.06, 0.06, 0.18, 0.14),
    "small_talk":         (0.04, 0.02, 0.03, 0.02),
    "echo":               (0.08, 0.08, 0.05, 0.05),
    "facts":              (0.04, 0.12, 0.04, 0.12),
    "mixed_chat":         (0.04, 0.16, 0.04, 0.16),
    "few_shot":           (0.04, 0.20, 0.03, 0.18),
    "small_sums":         (0.00, 0.00, 0.06, 0.03),
}  # fmt: skip

# Kinds that come in any size: (size of a short one, of a long one, maker). The size is in turns, facts, shots or sums.
SIZED: dict[str, tuple[tuple[int, int], tuple[int, int], Callable[[Random, int], str | Chat]]] = {
    "sum_sheet": ((4, 25), (4, 90), sum_sheet),
    "small_sums": ((4, 25), (4, 25), lambda rng, count: sum_sheet(rng, count, rng.choice((2, 10, 10, 30)))),
    "echo": ((1, 12), (1, 60), lambda rng, count: single_chat(rng, echo_turn(rng, count))),
    "facts": ((1, 5), (8, 40), lambda rng, count: single_chat(rng, facts_turn(rng, count))),
    "mixed_chat": ((2, 5), (6, 20), mixed_chat),
    "few_shot": ((0, 4), (5, 25), few_shot_sheet),
}
TURNS = {
    "story_chat": story_turn,
    "extraction": extraction,
    "extraction_variant": extraction_variant,
    "addition": addition,
    "small_talk": small_talk,
}


def document(kind: str, rng: Random, long: bool = False) -> str | Chat:
    if kind in SIZED:
        *sizes, make = SIZED[kind]
        return make(rng, rng.randint(*sizes[long]))
    if kind in TURNS:
        return single_chat(rng, TURNS[kind](rng))
    return {"story": story, "tool": tool_chat}[kind](rng)


def documents(seed: int, long: bool = False, late: bool = False) -> Iterator[str | Chat]:
    """The training stream: endless, the same for the same seed, free of held-out facts."""
    rng = Random(seed * 2 + long)
    shares = [share[2 * late + long] for share in SHARES.values()]
    while True:
        yield document(rng.choices(list(SHARES), shares)[0], rng, long)


class Item(NamedTuple):
    """One held-out question: a chat that waits for its answer, or a text to be completed, and what to expect."""

    prompt: str | Chat
    expect: Any


def eval_item(task: str, rng: Random) -> Item:
    if task == "few_shot":
        return Item(*few_shot(rng, rng.randint(24, 26), held=True))
    if task == "story":
        hero = a_character(rng)
        return Item(f"Once upon a time there was a {rng.choice(TRAITS)} {hero.kind} named {hero.name}.", hero)
    offered = offer(rng, 2)
    makers = {"extraction": extraction, "addition": addition, "tool": partial(tool_turn, offered=offered)}
    turn = makers[task](rng, held=True)
    messages = single_chat(rng, turn).messages[:-1]
    return Item(Chat(messages, [TOOL_SPECS[name] for name in offered] if task == "tool" else None), turn.expect)


def eval_items(task: str, n: int, seed: int = 1234) -> list[Item]:
    """`n` held-out items of a task: extraction, tool, addition, few_shot or story. Training saw none of their facts."""
    rng = Random(f"{task}-{seed}")
    return [eval_item(task, rng) for _ in range(n)]


def show(chat: Chat) -> str:
    tools = [f"tool: {to_json(tool['function'])}" for tool in chat.tools or []]
    said = [f"{m['role']}: {m['content'] or to_json(m['tool_calls'])}" for m in chat.messages]
    return "\n".join(tools + said)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print one document of every kind.")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    for kind in SHARES:
        made = document(kind, Random(args.seed), args.long)
        print(f"=== {kind}\n{made if isinstance(made, str) else show(made)}\n")


if __name__ == "__main__":
    main()
