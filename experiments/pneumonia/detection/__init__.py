"""Detection: what stands between a YOLO network's raw heads and a score on images with boxes.

Training     anchors    box sizes by k-means, spread over the heads
             augment    flips, shifts, zooms that move the boxes too
             targets    which cell and anchor answers for which box; what is ignored
             loss       the loss of raw heads against boxes
Prediction   heads      raw heads to boxes with scores, fixed shapes
             nms        of overlapping boxes the best stays, fixed shapes
Scores       score      the RSNA challenge's score; choice of its confidence threshold
             precision  mean average precision at 0.5, and over 0.4 to 0.75
             screening  the decision per image: ROC AUC with its interval, sensitivity at a specificity, calibration
             task       loss and score as `experiments.common.training` takes them

Boxes inside the library are corners (x1, y1, x2, y2) in pixels of the network's input, x to the right and y down;
data sets hold (x, y, width, height). `boxes` converts.
"""

from experiments.pneumonia.detection.anchors import kmeans_anchors as kmeans_anchors
from experiments.pneumonia.detection.boxes import corners as corners
from experiments.pneumonia.detection.boxes import iou as iou
from experiments.pneumonia.detection.boxes import sides as sides
from experiments.pneumonia.detection.heads import Decoded as Decoded
from experiments.pneumonia.detection.heads import Geometry as Geometry
from experiments.pneumonia.detection.heads import decode as decode
from experiments.pneumonia.detection.loss import yolo_loss as yolo_loss
from experiments.pneumonia.detection.nms import Detections as Detections
from experiments.pneumonia.detection.nms import non_maximum_suppression as non_maximum_suppression
from experiments.pneumonia.detection.precision import average_precision as average_precision
from experiments.pneumonia.detection.precision import mean_average_precision as mean_average_precision
from experiments.pneumonia.detection.score import challenge_score as challenge_score
from experiments.pneumonia.detection.score import choose_threshold as choose_threshold
from experiments.pneumonia.detection.targets import Targets as Targets
from experiments.pneumonia.detection.targets import assign as assign
from experiments.pneumonia.detection.task import detection as detection
from experiments.pneumonia.detection.task import predictor as predictor
