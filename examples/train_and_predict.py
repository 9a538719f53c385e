"""Train on the handwritten digits, then load the run and label images.

python examples/train_and_predict.py [EPOCHS]
"""

import sys

import minivit

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20

run = minivit.train(model="vit_nano_patch2_8", data="digits", epochs=epochs)
print(f"test accuracy {100 * run.test_accuracy:.1f} %, run folder {run.folder}")

model = minivit.load(run.folder)
digits = minivit.load_data("digits")
images, labels = digits.test_images[:5], digits.test_labels[:5]  # (5, 8, 8, 1) uint8, (5,)
answer = model.predict(images)
for label, name, confidence in zip(labels, answer.names, answer.confidence):
    print(f"a {label} is taken for a {name} with probability {confidence:.2f}")
