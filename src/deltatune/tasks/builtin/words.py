"""Word lists of the built-in tasks: frequent English words, each in one list of a task only."""

from __future__ import annotations

TOPICS = {
    "food": """bread meat cheese butter soup cake fruit apple egg milk wine beer tea coffee salt sugar rice corn
        honey meal chicken supper dinner breakfast lunch cream dish plate kitchen wheat flour grain fish juice pizza
        appetite""",
    "government": """congress court law judge jury vote election senate president constitution senator minister
        parliament policy citizen governor mayor committee republic legislature lawyer trial crime prison police
        candidate campaign ballot voter state nation politician treaty party""",
    "money": """price market tax bank loan debt income profit cost rent wage salary trade dollar cash budget stock
        bond investment customer consumer supply fee purchase revenue payment coin merchant insurance credit bargain
        fund sale deposit""",
    "religion": """church priest bishop prayer god angel heaven altar monk chapel bible faith sin soul saint devil
        temple prophet pope convent cathedral worship abbey blessing parish scripture religion spirit miracle
        missionary salvation mercy grace christian""",
    "science": """cell protein acid gene enzyme membrane molecule bacteria virus oxygen atom electron nucleus tissue
        organism species temperature pressure energy reaction ion hydrogen carbon particle magnet laser laboratory
        chemical radiation experiment equation velocity nitrogen neutron""",
    "war": """army soldier sword battle gun enemy officer bullet cannon troop cavalry attack siege wound victory
        rifle fort colonel sergeant camp weapon spear shield bomb defeat conquest invasion lieutenant pistol warrior
        combat commander helmet artillery""",
}

POSITIVE = """great happy beautiful kind pleasant lovely gentle sweet noble excellent charming delightful wonderful
    cheerful brilliant generous brave honest faithful graceful splendid bright merry wise clever handsome pretty
    perfect magnificent agreeable fortunate lucky tender peaceful amiable elegant delicious friendly successful
    grateful precious sincere glorious virtuous loving pure useful worthy healthy valuable innocent loyal comfortable
    polite famous nice awesome amazing fantastic attractive safe"""

NEGATIVE = """sad cruel terrible ugly horrible dreadful wretched miserable evil wicked angry unhappy dull false
    foolish stupid gloomy bitter awful dirty painful savage violent weak poor unpleasant vile mean selfish dismal
    melancholy fearful dangerous vulgar disagreeable rude hideous jealous coarse guilty unfortunate desperate brutal
    fatal dreary idle lazy furious useless hostile frightful ignorant wrong corrupt harsh severe tragic monstrous
    absurd nasty sick"""

PRONOUNS = {
    "he": """king father brother uncle son boy husband gentleman prince duke emperor monk priest lord knight bishop
        soldier sailor captain colonel butler grandfather nephew baron shepherd farmer policeman man fellow hero
        merchant general lad chap""",
    "she": """queen mother sister aunt daughter girl wife lady princess duchess countess maid nurse widow mistress
        woman niece grandmother bride actress housekeeper goddess witch maiden hostess empress heroine nun governess
        stepmother damsel sweetheart landlady nymph""",
    "it": """train storm letter wind book ship house fire clock engine river rain snow box door carriage table tree
        stone road bridge lamp machine cart garden bell boat tower piano rock song knife picture ring""",
    "they": """people men women children soldiers boys girls birds dogs horses trees ladies friends sailors brothers
        sisters servants ships prisoners letters books cattle flowers parents neighbours workers students houses
        stars clouds visitors sons daughters voters""",
}

SINGULAR = """man woman child boy girl dog horse bird tree house door book letter ship soldier king queen servant
    student teacher doctor farmer window chair table road river mountain city village church garden flower star cloud
    knife wolf leaf foot tooth mouse lady baby country family story enemy army body picture box watch dress glass
    horn bridge tower wall stone lamp clock boat wheel sword gun hat coat shoe finger eye ear hand arm friend brother
    sister cousin neighbour visitor prisoner sailor merchant priest lawyer judge writer singer baker nurse guest"""

IRREGULAR_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth", "mouse": "mice",
    "knife": "knives", "wolf": "wolves", "leaf": "leaves",
}  # fmt: skip

# Further fields, for series of words that belong together.
FIELDS = {
    "animal": """dog cat horse cow pig sheep goat lion tiger bear wolf fox elephant monkey mouse rat rabbit deer
        snake bird eagle crow duck insect bee fly lamb calf""",
    "body": """hand eye face arm foot finger hair lip neck shoulder knee cheek ear nose tooth mouth throat chest skin
        bone brow forehead chin elbow wrist thumb tongue stomach brain muscle leg toe beard fist lung liver breast""",
    "clothing": """coat hat dress cloak shirt boot shoe cap jacket gown uniform bonnet robe trousers belt suit scarf
        tie skirt veil shawl sleeve collar pocket button silk wool velvet cotton ribbon lace""",
    "feeling": """joy grief fear hope anger love sorrow pity shame gratitude rage happiness despair sadness terror
        tenderness pride envy jealousy delight horror pleasure pain misery passion hatred wonder surprise anxiety
        affection disgust regret""",
}

ACTIONS = """sing dance swim run read write speak smile laugh wait work sleep travel cook ride climb fight stay
    return walk sail listen learn play rest leave"""
