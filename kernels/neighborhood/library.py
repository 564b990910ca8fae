from .reference import attend as attend
