"""All layouts that the trainer runs, and the fastest ones that fit.

space      the candidates, and the rules that exclude one
knapsack   which activations each block saves
stages     which blocks each pipeline stage has
fastest    the search: bounds for all, the best ones exactly; `Model` is what it asks of a cost model
explain    why a layout is not the plan, and what it would cost
"""
