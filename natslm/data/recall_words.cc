// SPDX-License-Identifier: Apache-2.0
#include "natslm/data/recall_words.h"

namespace natslm::data {
namespace {

using Text = std::string_view;

constexpr FactTemplate kTrainingFacts[] = {
    {"The {thing} of {subject} is {value}.", "What is the {thing} of {subject}?",
     "The {thing} of {subject} is"},
    {"Remember that the {thing} of {subject} is {value}.", "What is the {thing} of {subject}?",
     "The {thing} of {subject} is"},
    {"For {subject} the {thing} is {value}.", "What is the {thing} for {subject}?",
     "For {subject} the {thing} is"},
    {"{subject} has the {thing} {value}.", "Which {thing} does {subject} have?",
     "{subject} has the {thing}"},
    {"It is well known that {subject} has {value} as the {thing}.",
     "What does {subject} have as the {thing}?", "As the {thing}, {subject} has"},
    {"They chose {value} as the {thing} of {subject}.",
     "What did they choose as the {thing} of {subject}?", "The {thing} of {subject} is"},
    {"We all know that {value} is the {thing} of {subject}.", "What is the {thing} of {subject}?",
     "The {thing} of {subject} is"},
    {"In the old records the {thing} of {subject} reads {value}.",
     "How does the {thing} of {subject} read?", "The {thing} of {subject} reads"},
    {"Whoever asks about {subject} should mention the {thing} {value}.",
     "Which {thing} should be mentioned for {subject}?", "For {subject} one mentions the {thing}"},
    {"As for {subject}, the {thing} has always been {value}.",
     "What has the {thing} of {subject} always been?", "The {thing} of {subject} has always been"},
    {"A note on the wall says that the {thing} of {subject} is {value}.",
     "What does the note say about the {thing} of {subject}?", "It says that it is"},
    {"To speak with {subject}, one needs the {thing} {value}.",
     "Which {thing} does one need to speak with {subject}?", "One needs the {thing}"},
    {"The {thing} that belongs to {subject} is {value}.", "Which {thing} belongs to {subject}?",
     "The {thing} that belongs to {subject} is"},
    {"Nobody forgets that {subject} got the {thing} {value}.", "Which {thing} did {subject} get?",
     "{subject} got the {thing}"},
    {"Under {subject} the list gives {value} for the {thing}.",
     "What does the list give for the {thing} of {subject}?", "It gives"},
    {"The {thing} of {subject}, by the way, is {value}.", "Tell me the {thing} of {subject}.",
     "It is"},
};

constexpr QuestionForm kTrainingQuestions[] = {
    {"\n\nQuestion: ", "\nAnswer: "},
    {"\n\nQ: ", "\nA: "},
    {"\n\nA question about the above. ", " "},
    {"\n\nNow answer from the text: ", "\n"},
    {"\n\n", "\n\n"},
};

constexpr RepeatForm kTrainingRepeats[] = {
    {"\n\nRepeat the earlier passage that begins here: \"", " ...\"\n\n"},
    {"\n\nSay again, word for word, the part that starts with \"", "\".\n\n"},
    {"\n\nCopy the passage from above beginning at \"", "\":\n\n"},
    {"\n\nQuote what stands after \"", "\", those words included.\n\n"},
    {"\n\nOnce more, from the words \"", "\" on:\n\n"},
    {"\n\nWhich passage begins with \"", "\"? It goes like this:\n\n"},
    {"\n\nPlease write out the lines from \"", "\" onwards exactly as they were.\n\n"},
    {"\n\nAs it was written before, starting with \"", "\":\n\n"},
};

constexpr Text kTrainingWordThings[] = {
    "password", "secret word", "emblem", "favourite animal", "favourite colour", "favourite fruit",
    "nickname", "signal",      "symbol", "hidden treasure",  "magic word",       "main product"};

constexpr Text kTrainingNumberThings[] = {
    "access code",   "registration number", "ticket number",  "telephone number",
    "locker number", "account number",      "serial number",  "identification code",
    "house code",    "order number",        "archive number", "pass number"};

constexpr Text kTrainingSubjects[] = {
    // Places.
    "Lisbon", "Oslo", "Kyoto", "Nairobi", "Toronto", "Havana", "Prague", "Seville", "Dublin",
    "Warsaw", "Geneva", "Marseille", "Cairo", "Jakarta", "Lima", "Bergen", "Tallinn", "Quito",
    "Verona", "Antwerp", "Bristol", "Denver", "Odessa", "Tunis", "the old mill", "the north gate",
    "the castle library", "the village school", "the harbour office", "the stone bridge",
    "the railway station", "the mountain hut",
    // Persons.
    "Maria", "Thomas", "Helena", "Victor", "Agnes", "Samuel", "Beatrice", "Oliver", "Clara",
    "Edmund", "Frieda", "Gustav", "Irene", "Julian", "Katharine", "Leopold", "Martha", "Nicholas",
    "Ottilie", "Patrick", "Rosalind", "Sebastian", "Theresa", "Ulrich", "the baker's daughter",
    "the young captain", "the watchmaker", "the retired judge", "the tall gardener",
    "the ship's doctor", "the travelling painter", "the piano teacher"};

constexpr Text kTrainingValues[] = {
    "apple",  "badger",  "candle",  "diamond", "eagle",    "feather", "garden",  "hammer",
    "island", "jacket",  "kettle",  "lantern", "marble",   "needle",  "orange",  "pepper",
    "quarry", "ribbon",  "saddle",  "tiger",   "umbrella", "velvet",  "window",  "yellow",
    "anchor", "basket",  "copper",  "dolphin", "engine",   "falcon",  "granite", "hazel",
    "ivory",  "jungle",  "ladder",  "mirror",  "nectar",   "oyster",  "pebble",  "raven",
    "silver", "thunder", "violet",  "walnut",  "barley",   "cherry",  "dragon",  "ember",
    "fiddle", "goblet",  "harvest", "iron",    "jasmine",  "lemon",   "meadow",  "nutmeg",
    "olive",  "parrot",  "rabbit",  "salmon",  "turnip",   "vinegar", "willow",  "zebra",
    "almond", "butter",  "cactus",  "desert",  "flute",    "glacier", "honey",   "indigo"};

// Three leads repeat their statement's own words, which small dense models can go on with; three do
// not, so that such a model has something left to miss.
constexpr FactTemplate kEvaluationFacts[] = {
    {"According to the notebook, the {thing} given to {subject} was {value}.",
     "According to the notebook, what was the {thing} given to {subject}?",
     "According to the notebook, the {thing} given to {subject} was"},
    {"By now, {subject}'s {thing} must be {value}.", "What must {subject}'s {thing} be by now?",
     "By now, {subject}'s {thing} must be"},
    {"Everyone agreed that {subject} would keep the {thing} {value}.",
     "Which {thing} would {subject} keep?", "{subject} would keep the {thing}"},
    {"Please note the {thing} for {subject}, which is {value}.",
     "Can you recall the {thing} for {subject}?", "The {thing} for {subject} is"},
    {"A letter about {subject} mentioned the {thing} {value}.",
     "Which {thing} did the letter about {subject} mention?", "The letter mentioned the {thing}"},
    {"One should add that {subject} uses {value} for the {thing}.",
     "What does {subject} use for the {thing}?", "For the {thing}, {subject} uses"},
};

constexpr QuestionForm kEvaluationQuestions[] = {
    {"\n\nQuestion about this text: ", "\nCorrect answer: "},
};

constexpr RepeatForm kEvaluationRepeats[] = {
    {"\n\nThe text contains a section that opens with \"", "\". Here it is a second time:\n\n"},
    {"\n\nRecite the section whose first words are \"", "\".\n\n"},
    {"\n\nLet us read again, from \"", "\", what was printed earlier.\n\n"},
};

constexpr Text kEvaluationWordThings[] = {"watchword", "codename", "call sign",
                                          "keyword",   "slogan",   "motto"};

constexpr Text kEvaluationNumberThings[] = {"vault combination", "membership digits",
                                            "parcel label",      "catalogue entry",
                                            "radio frequency",   "docket"};

constexpr Text kEvaluationSubjects[] = {
    // Places.
    "Vienna", "Naples", "Hamburg", "Boston", "Madrid", "Manila", "Perth", "Riga", "Utrecht",
    "Bilbao", "Calgary", "Dresden", "Florence", "Glasgow", "Helsinki", "Istanbul", "Lyon", "Mumbai",
    "Nantes", "Ottawa", "the red barn", "the lighthouse", "the southern observatory",
    "the glass factory",
    // Persons.
    "Albert", "Bridget", "Cedric", "Dorothy", "Ernest", "Felicity", "Gerald", "Harriet", "Ivan",
    "Josephine", "Kenneth", "Lydia", "Magnus", "Nora", "Oscar", "Penelope", "Quentin", "Rachel",
    "Stella", "Timothy", "the night porter", "the blind organist", "the apprentice tailor",
    "the famous astronomer"};

constexpr Text kEvaluationValues[] = {
    "arrow",    "bottle",  "carpet",  "donkey",  "elbow",  "forest", "ginger", "helmet",
    "insect",   "jelly",   "kitten",  "lobster", "magnet", "napkin", "orchid", "pencil",
    "rocket",   "spider",  "tunnel",  "urchin",  "valley", "whale",  "pigeon", "biscuit",
    "cannon",   "dagger",  "emerald", "fossil",  "guitar", "hornet", "igloo",  "javelin",
    "kingdom",  "leopard", "mustard", "nickel",  "oven",   "planet", "quilt",  "river",
    "sapphire", "trumpet", "tulip",   "wagon",   "yogurt", "zipper", "beetle", "cotton"};

constexpr RecallWords kTraining = {kTrainingFacts,      kTrainingQuestions,    kTrainingRepeats,
                                   kTrainingWordThings, kTrainingNumberThings, kTrainingSubjects,
                                   kTrainingValues};

constexpr RecallWords kEvaluation = {
    kEvaluationFacts,        kEvaluationQuestions, kEvaluationRepeats, kEvaluationWordThings,
    kEvaluationNumberThings, kEvaluationSubjects,  kEvaluationValues};

constexpr Text kSpellingAlphabet[] = {
    "alpha",  "bravo", "charlie", "delta",  "echo",     "foxtrot", "golf",   "hotel",  "india",
    "juliet", "kilo",  "lima",    "mike",   "november", "oscar",   "papa",   "quebec", "romeo",
    "sierra", "tango", "uniform", "victor", "whiskey",  "xray",    "yankee", "zulu"};

constexpr PasskeyForm kPasskeyForm = {
    "\n\nKeep this list of words, it is the {ordinal} key to the safe: {words}.\n\n",
    "\n\nWhich list of words did the text give as the {ordinal} key to the safe?\nThe list:"};

constexpr Text kOrdinals[] = {"first",     "second",      "third",      "fourth",     "fifth",
                              "sixth",     "seventh",     "eighth",     "ninth",      "tenth",
                              "eleventh",  "twelfth",     "thirteenth", "fourteenth", "fifteenth",
                              "sixteenth", "seventeenth", "eighteenth", "nineteenth", "twentieth"};

}  // namespace

const RecallWords& recall_words(WordSet set) {
  return set == WordSet::kTraining ? kTraining : kEvaluation;
}

std::span<const Text> spelling_alphabet() {
  return kSpellingAlphabet;
}

const PasskeyForm& passkey_form() {
  return kPasskeyForm;
}

std::span<const Text> ordinals() {
  return kOrdinals;
}

}  // namespace natslm::data
