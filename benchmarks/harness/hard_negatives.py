"""Commonly quoted texts that appear in evals without being leaks. For benchmarks/decontamination.py.

Each family has passages that appear in eval items and also, independently, in documents: speeches and poems in the
public domain, instructions for exam candidates, formulas in words, and clauses of licenses.
"""

from __future__ import annotations

FAMILIES: dict[str, tuple[str, ...]] = {
    "quotation": (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal.",
        "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
        "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.",
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
        "want of a wife.",
        "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake the "
        "darling buds of May, And summer's lease hath all too short a date.",
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
        "foolishness, it was the epoch of belief, it was the epoch of incredulity.",
    ),
    "instruction": (
        "Choose the one alternative that best completes the statement or answers the question, and mark only its "
        "letter.",
        "Read the passage below carefully, then answer each of the questions that follow it in one or two sentences.",
        "For each pair of statements, construct a complete truth table, and say whether the two are logically "
        "equivalent.",
        "Write a function that takes a list of integers and returns a new list with the duplicates removed, in order.",
        "Show all of your work, and give your final answer as a fraction in lowest terms or as a decimal to three "
        "places.",
    ),
    "formula": (
        "The sum of the first n terms of an arithmetic series is n times the sum of the first and last terms "
        "divided by two.",
        "The square of the hypotenuse of a right triangle is equal to the sum of the squares of the other two sides.",
        "For a quadratic equation a x squared plus b x plus c equals zero, x equals minus b plus or minus the "
        "square root of b squared minus four a c, all over two a.",
        "The derivative of a product of two functions is the first times the derivative of the second plus the "
        "second times the derivative of the first.",
        "The probability of A given B equals the probability of B given A times the probability of A divided by "
        "the probability of B.",
    ),
    "licence": (
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and "
        "associated documentation files, to deal in the Software without restriction.",
        "Unless required by applicable law or agreed to in writing, software distributed under the License is "
        "distributed on an AS IS BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND.",
        "Redistribution and use in source and binary forms, with or without modification, are permitted provided "
        "that the following conditions are met.",
        "This program is free software: you can redistribute it and/or modify it under the terms of the GNU "
        "General Public License as published by the Free Software Foundation.",
        "The above copyright notice and this permission notice shall be included in all copies or substantial "
        "portions of the Software.",
    ),
}
