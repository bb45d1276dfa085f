"""Maps each generator config to its class."""

from __future__ import annotations

from moray.pipelines.synthesize.config import Code, Generator, Gym, Maths, Programs, Rephrase
from moray.pipelines.synthesize.generators.code import CodeGenerator
from moray.pipelines.synthesize.generators.generator import GeneratorContext, ProceduralGenerator, TeacherGenerator
from moray.pipelines.synthesize.generators.gym import SolvedTaskGenerator, TeacherTaskGenerator
from moray.pipelines.synthesize.generators.maths import MathsGenerator
from moray.pipelines.synthesize.generators.programs import ProgramGenerator
from moray.pipelines.synthesize.generators.rephrase import RephraseGenerator


def open_generator(config: Generator, context: GeneratorContext) -> ProceduralGenerator | TeacherGenerator:
    match config:
        case Gym(solver="task"):
            return SolvedTaskGenerator(config)
        case Gym():
            return TeacherTaskGenerator(config, context)
        case Programs():
            return ProgramGenerator(config, context)
        case Maths():
            return MathsGenerator(config, context)
        case Code():
            return CodeGenerator(config, context)
        case Rephrase():
            return RephraseGenerator(config, context)
