settings+=()
