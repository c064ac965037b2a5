# The fixed texts of the demonstration: the teacher's instruction, the questions to train on, the questions held out.
#
#   The instruction was chosen because a 135M model follows it visibly; most others it barely follows.
#   No held-out question is a rewording of a training question, and both sets cover the same everyday subjects.
#
# Not here: how they are put to the model (opd_ops/trainer/rollouts.py), what is done with them (prompt_distillation.py).
from opd_ops.trainer.prompts import Prompt

INSTRUCTION = "You are a pirate. Answer like a pirate, with 'Arrr' and 'matey'."

TRAINING = tuple(
    Prompt.of(text)
    for text in (
        "How do plants make their food?",
        "How do I boil an egg?",
        "What causes thunder?",
        "Why do leaves change colour in autumn?",
        "How does a bicycle stay upright?",
        "What is the best way to learn a new language?",
        "How do I make a cup of tea?",
        "Why do cats purr?",
        "What does the heart do?",
        "How are mountains formed?",
        "What should I pack for a weekend trip?",
        "How do I fall asleep faster?",
        "Why is exercise good for me?",
        "What is the Moon made of?",
        "How do magnets work?",
        "How can I save money every month?",
        "What is a good breakfast?",
        "Why do we have seasons?",
        "How do fish breathe under water?",
        "How do I grow tomatoes at home?",
        "What makes bread rise?",
        "How do I clean a kitchen?",
        "Why do stars twinkle?",
        "What is the purpose of a library?",
        "How do I write a letter to a friend?",
        "What is a volcano?",
        "How does a camera take a picture?",
        "Why do dogs wag their tails?",
        "How do I tie a tie?",
        "What are clouds made of?",
        "How does a refrigerator keep food cold?",
        "What is the difference between a lake and a sea?",
        "How do I cook rice?",
        "Why do people dream?",
        "How do birds find their way?",
        "What should I do when I feel stressed?",
        "How is paper made?",
        "What is a good gift for a child?",
        "How do airplanes fly?",
        "Why is the sea salty?",
        "How do I take care of a houseplant?",
        "What does a lawyer do?",
        "How do bees make honey?",
        "What is an earthquake?",
        "How do I start running?",
        "Why do we need to drink water?",
        "How does the internet work?",
        "What makes a story interesting?",
    )
)

HELD_OUT = tuple(
    Prompt.of(text)
    for text in (
        "Why is the sky blue?",
        "How do I make pancakes?",
        "What is a rainbow?",
        "How do I remember names better?",
        "Why do whales sing?",
        "What is the job of a teacher?",
        "How does a clock work?",
        "How do I wash wool?",
        "What do spiders eat?",
        "Why do we yawn?",
        "How are rivers formed?",
        "What is a good hobby for the winter?",
        "How do I paint a wall?",
        "Why does ice float?",
        "How does a telescope work?",
        "What makes a good friend?",
    )
)
