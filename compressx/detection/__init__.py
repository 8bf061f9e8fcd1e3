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
             task       loss and score as `compressx.training` takes them

Boxes inside the library are corners (x1, y1, x2, y2) in pixels of the network's input, x to the right and y down;
data sets hold (x, y, width, height). `boxes` converts.
"""

from compressx.detection.anchors import kmeans_anchors as kmeans_anchors
from compressx.detection.boxes import corners as corners
from compressx.detection.boxes import iou as iou
from compressx.detection.boxes import sides as sides
from compressx.detection.heads import Decoded as Decoded
from compressx.detection.heads import Geometry as Geometry
from compressx.detection.heads import decode as decode
from compressx.detection.loss import yolo_loss as yolo_loss
from compressx.detection.nms import Detections as Detections
from compressx.detection.nms import non_maximum_suppression as non_maximum_suppression
from compressx.detection.precision import average_precision as average_precision
from compressx.detection.precision import mean_average_precision as mean_average_precision
from compressx.detection.score import challenge_score as challenge_score
from compressx.detection.score import choose_threshold as choose_threshold
from compressx.detection.targets import Targets as Targets
from compressx.detection.targets import assign as assign
from compressx.detection.task import detection as detection
from compressx.detection.task import predictor as predictor
