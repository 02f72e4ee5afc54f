"""What is in a video or an image, and its frames.

video        what is in a file, which frames a clip takes, and these frames resized and cropped
containers   opening a video file, and the times of its frames
images       images as RGB, within bounds
colour       what the colour tags say, and the conversion to BT.709
worker       the processes that decode, and how a lost one is replaced
"""
