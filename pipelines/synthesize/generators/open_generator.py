"""Which class makes the items of which generator of a recipe."""

from __future__ import annotations

from moray.pipelines.synthesize.config import Code, Generator, Gym, Maths, Programs, Rephrase
from moray.pipelines.synthesize.generators.code import CodeGenerator
from moray.pipelines.synthesize.generators.generator import GeneratorContext, ProceduralGenerator, TaughtGenerator
from moray.pipelines.synthesize.generators.gym import SolvedTaskGenerator, TaughtTaskGenerator
from moray.pipelines.synthesize.generators.maths import MathsGenerator
from moray.pipelines.synthesize.generators.programs import ProgramGenerator
from moray.pipelines.synthesize.generators.rephrase import RephraseGenerator


def open_generator(config: Generator, context: GeneratorContext) -> ProceduralGenerator | TaughtGenerator:
    match config:
        case Gym(solver="task"):
            return SolvedTaskGenerator(config)
        case Gym():
            return TaughtTaskGenerator(config, context)
        case Programs():
            return ProgramGenerator(config, context)
        case Maths():
            return MathsGenerator(config, context)
        case Code():
            return CodeGenerator(config, context)
        case Rephrase():
            return RephraseGenerator(config, context)
