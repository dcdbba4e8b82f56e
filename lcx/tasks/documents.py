"""Stand-ins for RULER's two question tasks: generated cards of people and companies instead of SQuAD and HotpotQA.

They keep the structure (gold documents among distractors, numbered and shuffled) but not the difficulty of human questions: scores
are not comparable with published ones.  The answer prefix restates the question, as in the other tasks; after a bare "Answer:"
SmolLM2-135M ends its turn at once.
"""

from __future__ import annotations

import numpy as np

from lcx.tasks.sizing import Draft, Form
from lcx.tasks.words import ADJECTIVES, COLLECTIONS, FIRST_NAMES, JOBS, LAST_NAMES, NOUNS, TOWNS

ANSWER_TOKENS = 32
INITIALS = "ABCDEFGHJKLMNPRSTVW"
MOST_PEOPLE = len(FIRST_NAMES) * len(INITIALS) * len(LAST_NAMES)
MOST_COMPANIES = len(ADJECTIVES) * len(NOUNS)
ARTICLE = 4  # people of a town that one "article" of qa_1 tells about


def _people(rng: np.random.Generator, count: int) -> list[str]:
    names = []
    for i in rng.permutation(MOST_PEOPLE)[:count]:
        rest, last = divmod(int(i), len(LAST_NAMES))
        first, initial = divmod(rest, len(INITIALS))
        names.append(f"{FIRST_NAMES[first]} {INITIALS[initial]}. {LAST_NAMES[last]}")
    return names


def _companies(rng: np.random.Generator, count: int) -> list[str]:
    picks = rng.permutation(MOST_COMPANIES)[:count]
    return [f"{ADJECTIVES[i // len(NOUNS)].title()} {NOUNS[i % len(NOUNS)].title()} Company" for i in picks]


def _draft(rng: np.random.Generator, cards: list[str], question: str, opening: str, answer: str) -> Draft:
    order = rng.permutation(len(cards))
    documents = "\n\n".join(f"Document {n + 1}: {cards[i]}" for n, i in enumerate(order))
    asked = f"Answer the question from the documents above. Question: {question}"
    body = (
        "Answer the question from the documents below. Give the answer alone, without other words.\n\n"
        f"{documents}\n\n{asked}"
    )
    return Draft(body, f"Answer: {opening}", (answer,), question=asked)


def _one_card(rng, shared, size, plan) -> Draft:
    names_rng, facts_rng, ask_rng, order_rng = rng.spawn(4)
    names = _people(names_rng, size + 1)
    # the gold card's town comes first, so that distractors are taken from its article before others
    towns = facts_rng.permutation(len(TOWNS))
    cards = []
    answers: list[tuple[str, str, str]] = []
    for i, name in enumerate(names):
        town = TOWNS[towns[i // ARTICLE % len(TOWNS)]]
        job, hobby = JOBS[facts_rng.integers(len(JOBS))], COLLECTIONS[facts_rng.integers(len(COLLECTIONS))]
        year = int(facts_rng.integers(1_850, 1_990))
        cards.append(f"{name} came to {town} in {year}, works there as {_article(job)} and collects {hobby}.")
        if i == 0:
            answers = [
                (f"What does {name} collect?", f"{name} collects", hobby),
                (f"What is the profession of {name}?", f"{name} works as", job),
                (f"In which year did {name} come to {town}?", f"{name} came to {town} in", str(year)),
            ]
    return _draft(order_rng, cards, *answers[ask_rng.integers(len(answers))])


def _two_cards(rng, shared, size, plan) -> Draft:
    people_rng, company_rng, facts_rng, order_rng = rng.spawn(4)
    num_people, num_companies = (size + 1) // 2 + 1, size // 2 + 1
    people, companies = _people(people_rng, num_people), _companies(company_rng, num_companies)
    cards = []
    town = ""
    for i in range(num_people):
        # person i works for company i; where there is one person more, two share the last company
        company = companies[min(i, num_companies - 1)]
        cards.append(f"{people[i]} works as {_article(JOBS[facts_rng.integers(len(JOBS))])} for the {company}.")
        if i < num_companies:
            place = TOWNS[facts_rng.integers(len(TOWNS))]
            cards.append(f"The {company} was founded in {place} in {int(facts_rng.integers(1_850, 1_990))}.")
            town = place if i == 0 else town
    question = f"In which town was the company founded that {people[0]} works for?"
    opening = f"The company that {people[0]} works for was founded in"
    return _draft(order_rng, cards, question, opening, town)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def qa_1(name: str) -> Form:
    """Build one gold card: a fact about a person.  Distractors are taken from the gold card's article (its town) first.

    Stand-in for SQuAD.  Unit of size: distractors.
    """
    return Form(name, ANSWER_TOKENS, "any", _one_card, 1, MOST_PEOPLE - 1)


def qa_2(name: str) -> Form:
    """Build two gold cards to join: where a person works, and where that company was founded.

    Stand-in for HotpotQA.  Unit of size: distractors, half of them people, half companies.
    """
    return Form(name, ANSWER_TOKENS, "any", _two_cards, 1, 2 * (min(MOST_PEOPLE, MOST_COMPANIES) - 2))
